// A linear layer on rows, for one type of input.
//
// Order: tile of rows by tile of rows, and for each all panels. So x, residual and y go by once, from front to back,
// while the packed weights come from the second-level cache again and again (128 bytes per 24 multiply-adds). Panel by
// panel with a chunk of rows in the cache lost 3 to 6 % of fp32 on ViT-Ti's shapes. What a tile will need is
// prefetched: 3 % on wide layers, 10 % on the narrow projection, whose rows come from the third-level cache.
#pragma once
#include "kernels/simd/tile.h"

namespace pyra::kernels::simd {
namespace {

/// Bias, GELU, row scale, residual and the store of a finished tile [M, kPanel] that lies in the cache.
template <bool kGelu>
void finish(const GemmCall& call, const float* tile, int64_t row, int64_t rows, int64_t column, int vectors) {
  for (int v = 0; v < vectors; ++v) {
    const int64_t first = column + kLanes * v;
    const Lanes mask = lanes(first, call.n);
    const Vector bias = call.bias ? load(call.bias + first, mask) : zero();
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t index = (row + m) * call.n + first;
      Vector y = add(load(tile + m * kPanel + kLanes * v), bias);
      if constexpr (kGelu) {
        if (call.slope) {
          Vector slope;
          y = gelu_with_slope(y, slope);
          store(call.slope + index, mask, slope);
        } else {
          y = call.y_bf16 ? gelu_coarse(y) : gelu(y);
        }
      }
      if (call.row_scale) y = multiply(y, broadcast(call.row_scale[row + m]));
      if (call.residual) y = add(y, load(call.residual + index, mask));
      store_any(call.y, call.y_bf16, index, mask, y);
    }
  }
}

template <int M, int NV>
PYRA_INLINE void keep_some(const GemmCall& call, int64_t row, int64_t column, Vector (&sum)[M][NV]) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    const uint8_t* bits = call.keep + (row + m) * call.keep_stride + column / 8;
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      sum[m][v] = where_set(bits + kLanes / 8 * v, multiply(sum[m][v], broadcast(call.keep_scale)));
    }
  }
}

template <int M>
PYRA_INLINE void prefetch_tile(const void* base, int64_t size, int64_t n, int64_t row, int64_t column) {
  const char* first = static_cast<const char*>(base) + (row * n + column) * size;
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    _mm_prefetch(first + m * n * size, _MM_HINT_T0);
    if (size * kPanel > 64) _mm_prefetch(first + m * n * size + 64, _MM_HINT_T0);
  }
}

template <class X, class W, int M, int NV>
void compute_tile(const GemmCall& call, const W* panel, const float* low_panel, int64_t row, int64_t column) {
  alignas(64) float tile[M * kPanel];
  prefetch_tile<M>(call.y, call.y_bf16 ? 2 : 4, call.n, row, column);
  if (call.residual) prefetch_tile<M>(call.residual, 4, call.n, row, column);
  Vector sum[M][NV];
  clear(sum);
  if (call.rank) {
    multiply_add(call.hidden + row * call.rank, call.rank, low_panel, kPanel, call.rank, sum);
    if (call.keep) keep_some(call, row, column, sum);
  }
  multiply_add(static_cast<const X*>(call.x) + row * call.x_stride, call.x_stride, panel, kPanel, call.k, sum);
  store_tile(tile, kPanel, sum);
  (call.gelu ? finish<true> : finish<false>)(call, tile, row, M, column, NV);
}

template <class X, class W>
struct RowTile {
  const GemmCall& call;
  int64_t depth;  // of a panel, in elements of W

  template <int M>
  void run(int64_t row) const {
    const int64_t panels = (call.n + kPanel - 1) / kPanel;
    for (int64_t p = 0; p < panels; ++p) {
      const W* panel = static_cast<const W*>(call.panels) + p * kPanel * depth;
      const float* low_panel = call.rank ? call.low_panels + p * kPanel * call.rank : nullptr;
      prefetch_next_rows<M>(row, p, panels);
      if (call.n - p * kPanel > kLanes) {
        compute_tile<X, W, M, 2>(call, panel, low_panel, row, p * kPanel);
      } else {
        compute_tile<X, W, M, 1>(call, panel, low_panel, row, p * kPanel);
      }
    }
  }

  /// A share of the next tile's x for each panel. Beyond the last row it asks for memory that nobody reads: harmless.
  template <int M>
  PYRA_INLINE void prefetch_next_rows(int64_t row, int64_t p, int64_t panels) const {
    const char* next = static_cast<const char*>(call.x) + (row + M) * call.x_stride * int64_t(sizeof(X));
    const int64_t lines = M * call.k * int64_t(sizeof(X)) / 64;
    for (int64_t i = p * lines / panels; i < (p + 1) * lines / panels; ++i) _mm_prefetch(next + 64 * i, _MM_HINT_T1);
  }
};

template <class X, class W>
void gemm(const GemmCall& call, int64_t rows) {
  for_row_tiles(rows, RowTile<X, W>{call, sizeof(X) == 2 ? (call.k + 1) / 2 : call.k});
}

}  // namespace
}  // namespace pyra::kernels::simd
