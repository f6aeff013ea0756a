// Which of the kernels' code paths this process takes.
#pragma once
#include <c10/core/ScalarType.h>

namespace pyra::kernels {

/// In rising order: each path includes the ones before it.
enum class CpuKernel {
  aten,         ///< any CPU: plain ATen operations
  avx2,         ///< AVX2 and FMA: own micro-kernels in fp32; bf16 is widened to fp32 on the way
  avx512,       ///< AVX-512 F, BW, VL and DQ: the same, wider
  avx512_bf16,  ///< and AVX512_BF16: dot products of bf16 pairs
};

/// The fastest path this CPU has (of Intel's not avx512_bf16, whose dot products are no gain there), or one that it has
/// named by the environment variable PYRA_CPU_KERNEL ("aten", "avx2", "avx512", "avx512-bf16"). Decided once per
/// process. Throws Error(device) when the variable names a path this CPU lacks, Error(usage) when it names none.
[[nodiscard]] CpuKernel cpu_kernel();

/// The last path this CPU has, fast or not.
[[nodiscard]] CpuKernel most_capable_cpu_kernel();

}  // namespace pyra::kernels
