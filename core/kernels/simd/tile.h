// The register tile that linear layers and attention share: up to kTileRows rows by two vectors of a matrix product.
//
// AVX-512: 12 rows x 2 vectors are 24 accumulators; with two columns and a broadcast that fills 27 of 32 registers. Per
// step of k: 24 multiply-adds, 2 loads, 12 broadcasts. AVX2: 6 rows, 12 accumulators, 15 of 16 registers. Each
// element's sum runs over k in order, whatever M and NV are, so a row's result does not depend on the rows around it.
#pragma once
#include "kernels/simd/math.h"
#include "kernels/simd/simd.h"

namespace pyra::kernels::simd {
namespace {

template <int M, int NV>
PYRA_INLINE void clear(Vector (&sum)[M][NV]) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sum[m][v] = zero();
  }
}

template <int M, int NV>
PYRA_INLINE void load_tile(const float* source, int64_t stride, Vector (&sum)[M][NV]) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sum[m][v] = load(source + m * stride + kLanes * v);
  }
}

template <int M, int NV>
PYRA_INLINE void store_tile(float* target, int64_t stride, const Vector (&sum)[M][NV]) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(target + m * stride + kLanes * v, sum[m][v]);
  }
}

/// sum += a b; a [M,k] with rows a_stride apart, b [k,kLanes NV] with rows b_stride apart.
template <int M, int NV>
PYRA_INLINE void multiply_add(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t k,
                              Vector (&sum)[M][NV]) {
  // A base reaches three rows by x86's scaled index: twelve pointers would not fit the registers.
  const float* base[(M + 2) / 3];
#pragma GCC unroll 4
  for (int b = 0; b < (M + 2) / 3; ++b) base[b] = a + 3 * b * a_stride;
  for (int64_t i = 0; i < k; ++i) {
    Vector column[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) column[v] = load(b + i * b_stride + kLanes * v);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const Vector factor = broadcast(base[m / 3][(m % 3) * a_stride + i]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[m][v] = fmadd(factor, column[v], sum[m][v]);
    }
  }
}

/// sum += aᵀ b; a [k,M] with rows a_stride apart.
template <int M, int NV>
PYRA_INLINE void multiply_add_transposed(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t k,
                                         Vector (&sum)[M][NV]) {
  for (int64_t i = 0; i < k; ++i) {
    Vector column[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) column[v] = load(b + i * b_stride + kLanes * v);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const Vector factor = broadcast(a[i * a_stride + m]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[m][v] = fmadd(factor, column[v], sum[m][v]);
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
                              Vector (&sum)[M][NV]) {
  const uint16_t* base[(M + 2) / 3];
#pragma GCC unroll 4
  for (int b = 0; b < (M + 2) / 3; ++b) base[b] = a + 3 * b * a_stride;
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

template <int M, class Body>
PYRA_INLINE void run_tile(int64_t row, int64_t rows, const Body& body) {
  if constexpr (M == 1) {
    body.template run<1>(row);
  } else if (rows == M) {
    body.template run<M>(row);
  } else {
    run_tile<M - 1>(row, rows, body);
  }
}

/// Calls `body.template run<M>(row)` for tiles of at most kTileRows rows that cover `rows`, as equal as can be.
template <class Body>
PYRA_INLINE void for_row_tiles(int64_t rows, const Body& body) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t row = i * rows / tiles;
    run_tile<kTileRows>(row, (i + 1) * rows / tiles - row, body);
  }
}

}  // namespace
}  // namespace pyra::kernels::simd
