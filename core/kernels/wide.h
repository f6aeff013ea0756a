// Sixteen floats at a time in GCC's vector extension: one AVX-512 register, two of AVX2, four of SSE2. Functions
// here are always inlined, so that each takes the instruction set of the function it is called from.
//
// For code that is short beside a model's linear layers, this buys one source for every CPU; kernels/simd is for the
// rest.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/cpu_kernel.h"

namespace pyra::kernels {

inline constexpr int64_t kWide = 16;
using Wide = float __attribute__((vector_size(kWide * sizeof(float))));
using WideInt = int32_t __attribute__((vector_size(kWide * sizeof(int32_t))));

enum class Isa { baseline, avx2, avx512 };

/// The widest of these that this CPU has; AVX-512 only where cpu_kernel() chose it too, so that PYRA_CPU_KERNEL
/// takes the merge kernels along.
[[nodiscard]] inline Isa widest_isa() {
  if (cpu_kernel() >= CpuKernel::avx512) return Isa::avx512;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

#define PYRA_INLINE __attribute__((always_inline)) inline
#if defined(__x86_64__)
#define PYRA_TARGET(features) __attribute__((target(features)))
#else
#define PYRA_TARGET(features)
#endif

template <Isa isa>
using IsaTag = std::integral_constant<Isa, isa>;

template <class Body>
PYRA_TARGET("avx512f,avx512dq,avx2,fma,prefer-vector-width=512")
void call_avx512(const Body& body) {
  body(IsaTag<Isa::avx512>{});
}

template <class Body>
PYRA_TARGET("avx2,fma")
void call_avx2(const Body& body) {
  body(IsaTag<Isa::avx2>{});
}

/// Calls body(IsaTag) compiled for `isa`, which this CPU must have; everything in it must be always_inline:
///   with_isa(widest_isa(), [&](auto isa) PYRA_INLINE_LAMBDA { search<isa() == Isa::avx512 ? 4 : 2>(problem); });
#define PYRA_INLINE_LAMBDA __attribute__((always_inline))
template <class Body>
void with_isa(Isa isa, const Body& body) {
  switch (isa) {
    case Isa::avx512:
      return call_avx512(body);
    case Isa::avx2:
      return call_avx2(body);
    case Isa::baseline:
      return body(IsaTag<Isa::baseline>{});
  }
}

// Vectors go by reference: by value their passing would depend on the instruction set (GCC's -Wpsabi).
PYRA_INLINE void load(Wide& out, const float* from) {
  std::memcpy(&out, from, sizeof(Wide));
}

PYRA_INLINE void store(float* to, const Wide& value) {
  std::memcpy(to, &value, sizeof(Wide));
}

/// Sum of the lanes, in one fixed order.
PYRA_INLINE float lane_sum(const Wide& value) {
  float lanes[kWide];
  store(lanes, value);
  for (int64_t width = kWide / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

/// sum a[i] * b[i]; the order of summation depends on n alone.
PYRA_INLINE float dot(const float* a, const float* b, int64_t n) {
  Wide sum{};
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    Wide x, y;
    load(x, a + i);
    load(y, b + i);
    sum += x * y;
  }
  float total = lane_sum(sum);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

/// sum a[i], in an order that depends on n alone.
PYRA_INLINE float total(const float* a, int64_t n) {
  Wide sum{};
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    Wide x;
    load(x, a + i);
    sum += x;
  }
  float result = lane_sum(sum);
  for (; i < n; ++i) result += a[i];
  return result;
}

}  // namespace pyra::kernels
