// Vector mathematics of the AVX-512 files. Everything has internal linkage: each file keeps its own copy, compiled
// with its own flags.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace pyra::kernels::simd {
namespace {

#define PYRA_INLINE [[gnu::always_inline]] inline

/// The lanes that exist of a vector at `first` in a row of `count`.
PYRA_INLINE __mmask16 lanes(int64_t first, int64_t count) {
  const int64_t left = count - first;
  return left >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << left) - 1);
}

PYRA_INLINE __m512 broadcast(float value) {
  return _mm512_set1_ps(value);
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

PYRA_INLINE __m512 load_any(const void* base, bool bf16, int64_t index, __mmask16 mask) {
  return bf16 ? widen(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(base) + index))
              : _mm512_maskz_loadu_ps(mask, static_cast<const float*>(base) + index);
}

PYRA_INLINE void store_any(void* base, bool bf16, int64_t index, __mmask16 mask, __m512 value) {
  if (bf16) {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(base) + index, mask, narrow(value));
  } else {
    _mm512_mask_storeu_ps(static_cast<float*>(base) + index, mask, value);
  }
}

/// 2^x for finite x <= 127. Relative error 9e-8 (own minimax fit of degree 5 on [-1/2, 1/2]).
PYRA_INLINE __m512 exp2_of(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = broadcast(0.0013264726899201418f);
  p = _mm512_fmadd_ps(p, f, broadcast(0.0096715126605719f));
  p = _mm512_fmadd_ps(p, f, broadcast(0.05550733744243393f));
  p = _mm512_fmadd_ps(p, f, broadcast(0.24022242084919124f));
  p = _mm512_fmadd_ps(p, f, broadcast(0.693146977598471f));
  p = _mm512_fmadd_ps(p, f, broadcast(1.0f));
  return _mm512_scalef_ps(p, n);
}

/// As exp2_of, relative error 3e-6 (degree 4): for results that are rounded to bf16 (4e-3).
PYRA_INLINE __m512 exp2_coarse(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = broadcast(0.009582852867472428f);
  p = _mm512_fmadd_ps(p, f, broadcast(0.055906424924598075f));
  p = _mm512_fmadd_ps(p, f, broadcast(0.24024098616711403f));
  p = _mm512_fmadd_ps(p, f, broadcast(0.6931241933586664f));
  p = _mm512_fmadd_ps(p, f, broadcast(1.0f));
  return _mm512_scalef_ps(p, n);
}

/// The upper tail of the normal distribution at 0 <= u <= 20: Q(u) = 2^g(u). g is smooth and nearly a parabola: an own
/// minimax fit of degree 8 on [0, 5.5] gives max(u, 1) Q(u) to 5e-8, and falls on beyond, where Q is below 2e-8. With
/// erfc's usual form, a polynomial in 1 / (1 + p u) times exp(-u²/2), it took a reciprocal and 7 operations more.
PYRA_INLINE __m512 normal_tail(__m512 u) {
  __m512 g = broadcast(-1.1209443898260228e-06f);
  g = _mm512_fmadd_ps(g, u, broadcast(1.8664976899603044e-05f));
  g = _mm512_fmadd_ps(g, u, broadcast(-8.809474733270866e-05f));
  g = _mm512_fmadd_ps(g, u, broadcast(-0.00036983043616734993f));
  g = _mm512_fmadd_ps(g, u, broadcast(0.007357664152001272f));
  g = _mm512_fmadd_ps(g, u, broadcast(-0.05268945392983588f));
  g = _mm512_fmadd_ps(g, u, broadcast(-0.45914868230962524f));
  g = _mm512_fmadd_ps(g, u, broadcast(-1.1511118922613675f));
  g = _mm512_fmadd_ps(g, u, broadcast(-0.9999998738952093f));
  return exp2_of(g);
}

/// As normal_tail, degree 5 and error 5e-6: for results that are rounded to bf16.
PYRA_INLINE __m512 normal_tail_coarse(__m512 u) {
  __m512 g = broadcast(-0.00041713168826828807f);
  g = _mm512_fmadd_ps(g, u, broadcast(0.006815674392042111f));
  g = _mm512_fmadd_ps(g, u, broadcast(-0.051475821581144214f));
  g = _mm512_fmadd_ps(g, u, broadcast(-0.4600295222411151f));
  g = _mm512_fmadd_ps(g, u, broadcast(-1.1509114778513552f));
  g = _mm512_fmadd_ps(g, u, broadcast(-1.0000065137386756f));
  return exp2_coarse(g);
}

/// |x|, cut where its tail is 0 already, so that squares stay finite.
PYRA_INLINE __m512 tail_argument(__m512 x) {
  return _mm512_min_ps(broadcast(20.0f), _mm512_abs_ps(x));
}

/// x Φ(x) = max(x, 0) - |x| Q(|x|): no cancellation on either side.
PYRA_INLINE __m512 gelu_from_tail(__m512 x, __m512 tail) {
  return _mm512_fnmadd_ps(_mm512_abs_ps(x), tail, _mm512_max_ps(_mm512_setzero_ps(), x));
}

PYRA_INLINE __m512 gelu(__m512 x) {
  return gelu_from_tail(x, normal_tail(tail_argument(x)));
}

PYRA_INLINE __m512 gelu_coarse(__m512 x) {
  return gelu_from_tail(x, normal_tail_coarse(tail_argument(x)));
}

/// GELU, and its slope Φ(x) + x φ(x).
PYRA_INLINE __m512 gelu_with_slope(__m512 x, __m512& slope) {
  const __m512 u = tail_argument(x);
  const __m512 tail = normal_tail(u);
  const __m512 density = exp2_of(_mm512_mul_ps(_mm512_mul_ps(u, u), broadcast(-0.7213475204444817f)));
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  const __m512 below = _mm512_mask_mov_ps(_mm512_sub_ps(broadcast(1.0f), tail), negative, tail);
  // x is cut as the tail's argument was: beyond, the density is 0 but infinity times 0 is not.
  const __m512 cut = _mm512_max_ps(broadcast(-20.0f), _mm512_min_ps(broadcast(20.0f), x));
  slope = _mm512_fmadd_ps(_mm512_mul_ps(cut, broadcast(0.3989422804014327f)), density, below);
  return gelu_from_tail(x, tail);
}

}  // namespace
}  // namespace pyra::kernels::simd
