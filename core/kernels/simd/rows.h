// Row-wise work around the matrix products: LayerNorm, masks, conversions, sums over rows.
#pragma once
#include "kernels/simd/tile.h"

namespace pyra::kernels::simd {
namespace {

/// Mean and 1/deviation of a row, in two passes over a row that the first brought into the cache.
PYRA_INLINE void moments(const float* x, int64_t c, float eps, float& mean, float& rstd) {
  Vector sum = zero();
  for (int64_t j = 0; j < c; j += kLanes) sum = add(sum, load(x + j, lanes(j, c)));
  mean = sum_of(sum) / float(c);
  Vector square = zero();
  for (int64_t j = 0; j < c; j += kLanes) {
    const Lanes mask = lanes(j, c);
    const Vector centred = existing(mask, subtract(load(x + j, mask), broadcast(mean)));
    square = fmadd(centred, centred, square);
  }
  rstd = 1.0f / __builtin_sqrtf(sum_of(square) / float(c) + eps);
}

PYRA_INLINE Vector normalised(const float* x, Lanes mask, float mean, float rstd) {
  return multiply(subtract(load(x, mask), broadcast(mean)), broadcast(rstd));
}

/// sums [M, n] += tᵀ z for M of t's columns.
template <int M>
void add_outer_rows(const float* t, int64_t t_stride, const float* z, int64_t rows, int64_t n, float* sums) {
  int64_t j = 0;
  for (; j + kPanel <= n; j += kPanel) {
    Vector sum[M][2];
    load_tile(sums + j, n, sum);
    multiply_add_transposed(t, t_stride, z + j, n, rows, sum);
    store_tile(sums + j, n, sum);
  }
  for (; j < n; j += kLanes) {
    const Lanes mask = lanes(j, n);
    for (int m = 0; m < M; ++m) {
      Vector sum = load(sums + m * n + j, mask);
      for (int64_t i = 0; i < rows; ++i) {
        sum = fmadd(broadcast(t[i * t_stride + m]), load(z + i * n + j, mask), sum);
      }
      store(sums + m * n + j, mask, sum);
    }
  }
}

struct OuterTile {
  const float *t, *z;
  int64_t rows, m, n;
  float* sums;
  template <int M>
  void run(int64_t first) const {
    add_outer_rows<M>(t + first, m, z, rows, n, sums + first * n);
  }
};

void layer_norm(const LayerNormCall& call, int64_t rows) {
  const int64_t c = call.c;
  for (int64_t i = 0; i < rows; ++i) {
    const float* x = call.x + i * c;
    float mean, rstd;
    moments(x, c, call.eps, mean, rstd);
    for (int64_t j = 0; j < c; j += kLanes) {
      const Lanes mask = lanes(j, c);
      const Vector y =
          fmadd(normalised(x + j, mask, mean, rstd), load(call.weight + j, mask), load(call.bias + j, mask));
      store_any(call.y, call.y_bf16, i * c + j, mask, y);
    }
    if (call.mean) call.mean[i] = mean, call.rstd[i] = rstd;
  }
}

void layer_norm_backward(const LayerNormBackwardCall& call, int64_t rows) {
  const int64_t c = call.c;
  for (int64_t i = 0; i < rows; ++i) {
    const float* x = call.x + i * c;
    const float mean = call.mean[i], rstd = call.rstd[i];
    Vector sum = zero(), dot = zero();
    for (int64_t j = 0; j < c; j += kLanes) {
      const Lanes mask = lanes(j, c);
      const Vector dy = load_any(call.dy, call.dy_bf16, i * c + j, mask);
      const Vector unit = normalised(x + j, mask, mean, rstd);
      const Vector g = multiply(dy, load(call.weight + j, mask));
      sum = add(sum, g);
      dot = fmadd(g, unit, dot);
      if (call.dweight) {
        const Vector total = load(call.dweight + j, mask);
        store(call.dweight + j, mask, fmadd(dy, unit, total));
      }
      if (call.dbias) {
        store(call.dbias + j, mask, add(dy, load(call.dbias + j, mask)));
      }
    }
    if (!call.dx) continue;
    const Vector mean_g = broadcast(sum_of(sum) / float(c));
    const Vector mean_dot = broadcast(sum_of(dot) / float(c));
    for (int64_t j = 0; j < c; j += kLanes) {
      const Lanes mask = lanes(j, c);
      const Vector unit = normalised(x + j, mask, mean, rstd);
      Vector g = multiply(load_any(call.dy, call.dy_bf16, i * c + j, mask), load(call.weight + j, mask));
      g = fnmadd(unit, mean_dot, subtract(g, mean_g));
      store(call.dx + i * c + j, mask, multiply(g, broadcast(rstd)));
    }
  }
}

void widen(const uint16_t* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Lanes mask = lanes(i, count);
    store(out + i, mask, load_any(x, true, i, mask));
  }
}

void narrow(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Lanes mask = lanes(i, count);
    store_any(out, true, i, mask, load(x + i, mask));
  }
}

void scale_rows(const void* dy, bool dy_bf16, const float* slope, const float* row_scale, int64_t rows, int64_t n,
                float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const Vector scale = broadcast(row_scale ? row_scale[i] : 1.0f);
    for (int64_t j = 0; j < n; j += kLanes) {
      const Lanes mask = lanes(j, n);
      Vector z = multiply(load_any(dy, dy_bf16, i * n + j, mask), scale);
      if (slope) z = multiply(z, load(slope + i * n + j, mask));
      store(out + i * n + j, mask, z);
    }
  }
}

void add_outer(const float* t, const float* z, int64_t rows, int64_t m, int64_t n, float* sums) {
  for_row_tiles(m, OuterTile{t, z, rows, m, n, sums});
}

void add_columns(const float* z, int64_t rows, int64_t n, float* sums) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const Lanes mask = lanes(j, n);
    Vector sum = load(sums + j, mask);
    for (int64_t i = 0; i < rows; ++i) sum = add(sum, load(z + i * n + j, mask));
    store(sums + j, mask, sum);
  }
}

void mask(const void* x, bool x_bf16, const uint8_t* bits, float scale, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Lanes mask = lanes(i, count);
    store(out + i, mask, where_set(bits + i / 8, multiply(load_any(x, x_bf16, i, mask), broadcast(scale))));
  }
}

}  // namespace
}  // namespace pyra::kernels::simd
