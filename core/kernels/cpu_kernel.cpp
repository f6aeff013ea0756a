#include "kernels/cpu_kernel.h"

#include <array>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "kernels/linear.h"

namespace pyra::kernels {
namespace {

constexpr std::array<const char*, 4> kNames{"aten", "avx2", "avx512", "avx512-bf16"};

}  // namespace

CpuKernel most_capable_cpu_kernel() {
#if defined(PYRA_SIMD_X86)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuKernel::aten;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2")) {
    return __builtin_cpu_supports("avx512bf16") ? CpuKernel::avx512_bf16 : CpuKernel::avx512;
  }
  return CpuKernel::avx2;
#else
  return CpuKernel::aten;
#endif
}

namespace {

/// Intel's cores take four times as long for a dot product of bf16 pairs as for an FMA of fp32, so half the rate (0.76
/// and 0.19 ns on one Xeon, 2026-11-28: a dense ViT-Ti ran at 43 images/s by the one and 73 by the other); AMD's as
/// long.
CpuKernel fastest_of_this_cpu(CpuKernel most) {
#if defined(PYRA_SIMD_X86)
  if (most == CpuKernel::avx512_bf16 && __builtin_cpu_is("intel")) return CpuKernel::avx512;
#endif
  return most;
}

CpuKernel decide() {
  const CpuKernel most = most_capable_cpu_kernel();
  const char* wish = std::getenv("PYRA_CPU_KERNEL");
  if (wish == nullptr || *wish == '\0') return fastest_of_this_cpu(most);
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (std::string_view(wish) != kNames[i]) continue;
    if (CpuKernel(i) > most) {
      fail(ExitCode::device, "PYRA_CPU_KERNEL=", wish, ": this CPU has only '", kNames[size_t(most)],
           "'; unset the variable or name that");
    }
    return CpuKernel(i);
  }
  fail(ExitCode::usage, "PYRA_CPU_KERNEL=", wish, ": expected aten, avx2, avx512 or avx512-bf16");
}

}  // namespace

CpuKernel cpu_kernel() {
  static const CpuKernel chosen = decide();
  return chosen;
}

const char* cpu_micro_kernel() {
  return kNames[size_t(cpu_kernel())];
}

}  // namespace pyra::kernels
