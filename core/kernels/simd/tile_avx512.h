// The register tile that linear layers and attention share: up to 12 rows by 32 columns of a matrix product.
//
// 12 rows x 2 vectors are 24 accumulators; with two columns and a broadcast that fills the 32 registers. Per step of
// k: 24 multiply-adds, 2 loads, 12 broadcasts. Each element's sum runs over k in order, whatever M and NV are, so a
// row's result does not depend on the rows around it.
#pragma once
#include "kernels/simd/math_avx512.h"
#include "kernels/simd/simd.h"

namespace pyra::kernels::simd {
namespace {

template <int M, int NV>
PYRA_INLINE void clear(__m512 (&sum)[M][NV]) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sum[m][v] = _mm512_setzero_ps();
  }
}

template <int M, int NV>
PYRA_INLINE void load_tile(const float* source, int64_t stride, __m512 (&sum)[M][NV]) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sum[m][v] = _mm512_loadu_ps(source + m * stride + 16 * v);
  }
}

template <int M, int NV>
PYRA_INLINE void store_tile(float* target, int64_t stride, const __m512 (&sum)[M][NV]) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) _mm512_storeu_ps(target + m * stride + 16 * v, sum[m][v]);
  }
}

/// sum += a b; a [M,k] with rows a_stride apart, b [k,16 NV] with rows b_stride apart.
template <int M, int NV>
PYRA_INLINE void multiply_add(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t k,
                              __m512 (&sum)[M][NV]) {
  // Four bases reach twelve rows by x86's scaled index, where twelve pointers would not fit the registers.
  const float* base[4] = {a, a + 3 * a_stride, a + 6 * a_stride, a + 9 * a_stride};
  for (int64_t i = 0; i < k; ++i) {
    __m512 column[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) column[v] = _mm512_loadu_ps(b + i * b_stride + 16 * v);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const __m512 factor = broadcast(base[m / 3][(m % 3) * a_stride + i]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[m][v] = _mm512_fmadd_ps(factor, column[v], sum[m][v]);
    }
  }
}

/// sum += aᵀ b; a [k,M] with rows a_stride apart.
template <int M, int NV>
PYRA_INLINE void multiply_add_transposed(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t k,
                                         __m512 (&sum)[M][NV]) {
  for (int64_t i = 0; i < k; ++i) {
    __m512 column[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) column[v] = _mm512_loadu_ps(b + i * b_stride + 16 * v);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const __m512 factor = broadcast(a[i * a_stride + m]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[m][v] = _mm512_fmadd_ps(factor, column[v], sum[m][v]);
    }
  }
}

#ifdef __AVX512BF16__
/// Two neighbours of a row of bf16, as VDPBF16PS wants them.
PYRA_INLINE uint32_t pair_at(const uint16_t* p) {
  uint32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return pair;
}

template <int NV>
PYRA_INLINE void load_pairs(const uint32_t* b, __m512bh (&column)[NV]) {
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) column[v] = (__m512bh)_mm512_loadu_si512(b + 16 * v);
}

/// sum += a b in bf16; b [ceil(k/2), 16 NV] pairs along k.
template <int M, int NV>
PYRA_INLINE void multiply_add(const uint16_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t k,
                              __m512 (&sum)[M][NV]) {
  const uint16_t* base[4] = {a, a + 3 * a_stride, a + 6 * a_stride, a + 9 * a_stride};
  __m512bh column[NV];
  for (int64_t i = 0; i < k / 2; ++i) {
    load_pairs(b + i * b_stride, column);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const auto factor = (__m512bh)_mm512_set1_epi32(int(pair_at(base[m / 3] + (m % 3) * a_stride + 2 * i)));
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], factor, column[v]);
    }
  }
  if (k % 2 == 0) return;
  load_pairs(b + k / 2 * b_stride, column);
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    const auto factor = (__m512bh)_mm512_set1_epi32(base[m / 3][(m % 3) * a_stride + k - 1]);
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], factor, column[v]);
  }
}
#endif

/// Calls `body.template run<M>(row)` for tiles of at most 12 rows that cover `rows`, as equal as can be.
template <class Body>
PYRA_INLINE void for_row_tiles(int64_t rows, const Body& body) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t row = i * rows / tiles;
    switch ((i + 1) * rows / tiles - row) {
      case 1:
        body.template run<1>(row);
        break;
      case 2:
        body.template run<2>(row);
        break;
      case 3:
        body.template run<3>(row);
        break;
      case 4:
        body.template run<4>(row);
        break;
      case 5:
        body.template run<5>(row);
        break;
      case 6:
        body.template run<6>(row);
        break;
      case 7:
        body.template run<7>(row);
        break;
      case 8:
        body.template run<8>(row);
        break;
      case 9:
        body.template run<9>(row);
        break;
      case 10:
        body.template run<10>(row);
        break;
      case 11:
        body.template run<11>(row);
        break;
      default:
        body.template run<12>(row);
        break;
    }
  }
}

}  // namespace
}  // namespace pyra::kernels::simd
