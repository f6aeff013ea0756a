// The vector of the AVX-512 files: 16 floats. vector_avx2.h has the same names for 8; everything that math.h and the
// tiles do is written in them. All has internal linkage: each file keeps its own copy, compiled with its own flags.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace pyra::kernels::simd {
namespace {

#define PYRA_INLINE [[gnu::always_inline]] inline

using Vector = __m512;
using Lanes = __mmask16;  ///< which lanes of a vector exist

inline constexpr int64_t kLanes = 16;
/// Columns of a panel: two vectors.
inline constexpr int64_t kPanel = 32;
/// Rows of a register tile: 12 x 2 accumulators, two columns and a broadcast fit the 32 registers.
inline constexpr int64_t kTileRows = 12;

/// The lanes that exist of a vector at `first` in a row of `count`.
PYRA_INLINE Lanes lanes(int64_t first, int64_t count) {
  const int64_t left = count - first;
  return left >= 16 ? Lanes(0xFFFF) : Lanes((1u << left) - 1);
}

PYRA_INLINE Vector zero() {
  return _mm512_setzero_ps();
}
PYRA_INLINE Vector broadcast(float value) {
  return _mm512_set1_ps(value);
}

PYRA_INLINE Vector load(const float* p) {
  return _mm512_loadu_ps(p);
}
/// Lanes that do not exist are 0 and not read.
PYRA_INLINE Vector load(const float* p, Lanes which) {
  return _mm512_maskz_loadu_ps(which, p);
}
PYRA_INLINE void store(float* p, Vector x) {
  _mm512_storeu_ps(p, x);
}
PYRA_INLINE void store(float* p, Lanes which, Vector x) {
  _mm512_mask_storeu_ps(p, which, x);
}
/// x where a lane exists, else 0.
PYRA_INLINE Vector existing(Lanes which, Vector x) {
  return _mm512_maskz_mov_ps(which, x);
}

PYRA_INLINE Vector add(Vector a, Vector b) {
  return _mm512_add_ps(a, b);
}
PYRA_INLINE Vector subtract(Vector a, Vector b) {
  return _mm512_sub_ps(a, b);
}
PYRA_INLINE Vector multiply(Vector a, Vector b) {
  return _mm512_mul_ps(a, b);
}
/// a b + c
PYRA_INLINE Vector fmadd(Vector a, Vector b, Vector c) {
  return _mm512_fmadd_ps(a, b, c);
}
/// c - a b
PYRA_INLINE Vector fnmadd(Vector a, Vector b, Vector c) {
  return _mm512_fnmadd_ps(a, b, c);
}
/// The second argument where one of them is a NaN.
PYRA_INLINE Vector smaller(Vector a, Vector b) {
  return _mm512_min_ps(a, b);
}
PYRA_INLINE Vector larger(Vector a, Vector b) {
  return _mm512_max_ps(a, b);
}
PYRA_INLINE Vector absolute(Vector x) {
  return _mm512_abs_ps(x);
}
PYRA_INLINE Vector nearest(Vector x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/// p 2^n, n a whole number.
PYRA_INLINE Vector times_power(Vector p, Vector n) {
  return _mm512_scalef_ps(p, n);
}
/// `below` where x < 0, else `above`.
PYRA_INLINE Vector by_sign(Vector x, Vector below, Vector above) {
  return _mm512_mask_mov_ps(above, _mm512_cmp_ps_mask(x, zero(), _CMP_LT_OQ), below);
}
PYRA_INLINE float sum_of(Vector x) {
  return _mm512_reduce_add_ps(x);
}
PYRA_INLINE float largest_of(Vector x) {
  return _mm512_reduce_max_ps(x);
}

/// x where the bit is set, else 0; a bit a lane, the first lane's lowest.
PYRA_INLINE Vector where_set(const uint8_t* bits, Vector x) {
  uint16_t mask;
  __builtin_memcpy(&mask, bits, sizeof mask);
  return _mm512_maskz_mov_ps(mask, x);
}

PYRA_INLINE __m512 widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

/// fp32 to bf16, to nearest even; a NaN stays one.
PYRA_INLINE __m256i narrow(__m512 x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}

PYRA_INLINE Vector load_bf16(const uint16_t* p, Lanes which) {
  return widen(_mm256_maskz_loadu_epi16(which, p));
}
PYRA_INLINE void store_bf16(uint16_t* p, Lanes which, Vector x) {
  _mm256_mask_storeu_epi16(p, which, narrow(x));
}
PYRA_INLINE void store_bf16(uint16_t* p, Vector x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x));
}

/// Transposes the 16 x 16 elements of `r`.
PYRA_INLINE void transpose(Vector (&rows)[16]) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(rows[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4 i + j] holds, for its four rows, column j of each 128-bit lane; the lanes change places now.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xDD);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xDD);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xDD);
    r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_castsi512_ps(r[i]);
}

}  // namespace
}  // namespace pyra::kernels::simd
