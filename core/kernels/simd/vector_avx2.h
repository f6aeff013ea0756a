// The vector of the AVX2 files: 8 floats. The names are vector_avx512.h's, and said there what they do.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace pyra::kernels::simd {
namespace {

#define PYRA_INLINE [[gnu::always_inline]] inline

using Vector = __m256;
/// How many lanes exist, 0 to 8. Whole vectors take plain loads and stores: masked stores are slow on AMD.
using Lanes = int;

inline constexpr int64_t kLanes = 8;
inline constexpr int64_t kPanel = 16;
/// Rows of a register tile: 6 x 2 accumulators, two columns and a broadcast fit the 16 registers.
inline constexpr int64_t kTileRows = 6;

PYRA_INLINE Lanes lanes(int64_t first, int64_t count) {
  const int64_t left = count - first;
  return left >= 8 ? 8 : Lanes(left);
}

PYRA_INLINE __m256i mask_of(Lanes which) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(which), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

PYRA_INLINE Vector zero() {
  return _mm256_setzero_ps();
}
PYRA_INLINE Vector broadcast(float value) {
  return _mm256_set1_ps(value);
}

PYRA_INLINE Vector load(const float* p) {
  return _mm256_loadu_ps(p);
}
PYRA_INLINE Vector load(const float* p, Lanes which) {
  return which == 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, mask_of(which));
}
PYRA_INLINE void store(float* p, Vector x) {
  _mm256_storeu_ps(p, x);
}
PYRA_INLINE void store(float* p, Lanes which, Vector x) {
  if (which == 8) {
    _mm256_storeu_ps(p, x);
  } else {
    _mm256_maskstore_ps(p, mask_of(which), x);
  }
}
PYRA_INLINE Vector existing(Lanes which, Vector x) {
  return which == 8 ? x : _mm256_and_ps(x, _mm256_castsi256_ps(mask_of(which)));
}

PYRA_INLINE Vector add(Vector a, Vector b) {
  return _mm256_add_ps(a, b);
}
PYRA_INLINE Vector subtract(Vector a, Vector b) {
  return _mm256_sub_ps(a, b);
}
PYRA_INLINE Vector multiply(Vector a, Vector b) {
  return _mm256_mul_ps(a, b);
}
PYRA_INLINE Vector fmadd(Vector a, Vector b, Vector c) {
  return _mm256_fmadd_ps(a, b, c);
}
PYRA_INLINE Vector fnmadd(Vector a, Vector b, Vector c) {
  return _mm256_fnmadd_ps(a, b, c);
}
PYRA_INLINE Vector smaller(Vector a, Vector b) {
  return _mm256_min_ps(a, b);
}
PYRA_INLINE Vector larger(Vector a, Vector b) {
  return _mm256_max_ps(a, b);
}
PYRA_INLINE Vector absolute(Vector x) {
  return _mm256_andnot_ps(broadcast(-0.0f), x);
}
PYRA_INLINE Vector nearest(Vector x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/// n from -127 on counts: at and below it the result is 0, where VSCALEF would give a denormal.
PYRA_INLINE Vector times_power(Vector p, Vector n) {
  const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(larger(broadcast(-127.0f), n)), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
}
PYRA_INLINE Vector by_sign(Vector x, Vector below, Vector above) {
  return _mm256_blendv_ps(above, below, _mm256_cmp_ps(x, zero(), _CMP_LT_OQ));
}
PYRA_INLINE float sum_of(Vector x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
PYRA_INLINE float largest_of(Vector x) {
  __m128 largest = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  largest = _mm_max_ps(largest, _mm_movehl_ps(largest, largest));
  return _mm_cvtss_f32(_mm_max_ss(largest, _mm_movehdup_ps(largest)));
}

PYRA_INLINE Vector where_set(const uint8_t* bits, Vector x) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(*bits), bit);
  return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)));
}

PYRA_INLINE __m256 widen(__m128i bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}

PYRA_INLINE __m128i narrow(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000),
                               _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  const __m256i halves = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

PYRA_INLINE Vector load_bf16(const uint16_t* p, Lanes which) {
  if (which == 8) return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  uint16_t part[8] = {};
  __builtin_memcpy(part, p, size_t(which) * 2);
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(part)));
}
PYRA_INLINE void store_bf16(uint16_t* p, Vector x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x));
}
PYRA_INLINE void store_bf16(uint16_t* p, Lanes which, Vector x) {
  if (which == 8) return store_bf16(p, x);
  uint16_t part[8];
  store_bf16(part, x);
  __builtin_memcpy(p, part, size_t(which) * 2);
}

PYRA_INLINE void transpose(Vector (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
  }
  // r[4 i + j] holds, for its four rows, column j of each 128-bit lane; the lanes change places now.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
    t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

}  // namespace
}  // namespace pyra::kernels::simd
