// Attention of one head forward, for one type of input.
//
// Keys are transposed once into panels. Then, for each tile of queries: logits (tile x keys) against the panels,
// softmax in place while they lie in the first-level cache, and the product with the values, divided by the row's
// sum on the way out. Probabilities of bf16 are rounded to bf16 for that product, their sums are not.
#pragma once
#include "kernels/simd/tile.h"
#include "kernels/simd/transpose.h"

namespace pyra::kernels::simd {
namespace {

inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

/// Logits of M queries, unscaled, rows `padded` apart.
template <int M, class Q, class K>
PYRA_INLINE void query_logits(const Q* q, int64_t stride, const K* panels, int64_t head_dim, int64_t tokens,
                              int64_t padded, float* logits) {
  const int64_t depth = sizeof(Q) == 2 ? head_dim / 2 : head_dim;
  for (int64_t key = 0; key < tokens; key += kPanel) {
    const K* panel = panels + key * depth;
    if (tokens - key > kLanes) {
      Vector sum[M][2];
      clear(sum);
      multiply_add(q, stride, panel, kPanel, head_dim, sum);
      store_tile(logits + key, padded, sum);
    } else {
      Vector sum[M][1];
      clear(sum);
      multiply_add(q, stride, panel, kPanel, head_dim, sum);
      store_tile(logits + key, padded, sum);
    }
  }
}

/// The base-2 logits of a row, scaled and biased in place; returns their maximum.
PYRA_INLINE float scale_logits(float* row, const float* bias, float scale, int64_t tokens) {
  Vector largest = broadcast(-__builtin_inff());
  for (int64_t j = 0; j < tokens; j += kLanes) {
    const Vector logit = fmadd(load(row + j), broadcast(scale), load(bias + j));
    store(row + j, logit);
    largest = larger(largest, logit);
  }
  return largest_of(largest);
}

PYRA_INLINE void put_probabilities(float* target, int64_t j, Vector p) {
  store(target + j, p);
}
PYRA_INLINE void put_probabilities(uint16_t* target, int64_t j, Vector p) {
  store_bf16(target + j, p);
}

/// 2^(logit - largest) of a row to `target`; returns their sum.
template <class P>
PYRA_INLINE float exponentials(const float* row, float largest, int64_t tokens, P* target) {
  Vector sum = zero();
  for (int64_t j = 0; j < tokens; j += kLanes) {
    const Vector shifted = subtract(load(row + j), broadcast(largest));
    const Vector p = sizeof(P) == 2 ? exp2_coarse(shifted) : exp2_of(shifted);
    sum = add(sum, p);
    put_probabilities(target, j, p);
  }
  return sum_of(sum);
}

template <int M, int NV, class P, class V>
PYRA_INLINE void weigh_values(const P* p, int64_t padded, const V* v, int64_t v_stride, int64_t tokens,
                              const float* inverse, P* out, int64_t out_stride) {
  Vector sum[M][NV];
  clear(sum);
  multiply_add(p, padded, v, v_stride, tokens, sum);
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i) {
      put_probabilities(out + m * out_stride, kLanes * i, multiply(sum[m][i], broadcast(inverse[m])));
    }
  }
}

/// Q: type of q, k, v, out and the probabilities. K, V: elements of packed keys and values (pairs in bf16).
template <class Q, class K>
struct QueryTile {
  const AttentionCall& call;
  const K* keys;
  const K* values;
  int64_t value_stride;
  float* logits;
  Q* probabilities;
  int64_t padded;

  template <int M>
  void run(int64_t row) const {
    query_logits<M>(static_cast<const Q*>(call.q) + row * call.stride, call.stride, keys, call.head_dim, call.tokens,
                    padded, logits);
    float inverse[M];
    for (int m = 0; m < M; ++m) {
      float* logit = logits + m * padded;
      const float largest = scale_logits(logit, call.bias, call.scale * kLog2E, call.tokens);
      const float sum = exponentials(logit, largest, call.tokens, probabilities + m * padded);
      inverse[m] = 1.0f / sum;
      if (row + m == 0 && call.class_row) write_class_row(largest, inverse[0]);
      if (call.log_sum) call.log_sum[row + m] = (largest + __builtin_log2f(sum)) * kLn2;
    }
    Q* out = static_cast<Q*>(call.out) + row * call.out_stride;
    for (int64_t d = 0; d < call.head_dim; d += kPanel) {
      if (call.head_dim - d > kLanes) {
        weigh_values<M, 2>(probabilities, padded, values + d, value_stride, call.tokens, inverse, out + d,
                           call.out_stride);
      } else {
        weigh_values<M, 1>(probabilities, padded, values + d, value_stride, call.tokens, inverse, out + d,
                           call.out_stride);
      }
    }
  }

  /// From the logits where they are still there: probabilities of bf16 are rounded already.
  void write_class_row(float largest, float inverse) const {
    for (int64_t j = 0; j < call.tokens; j += kLanes) {
      Vector p = load(logits + j);
      if constexpr (sizeof(Q) == 2) p = exp2_coarse(subtract(p, broadcast(largest)));
      store(call.class_row + j, lanes(j, call.tokens), multiply(p, broadcast(inverse)));
    }
  }
};

}  // namespace
}  // namespace pyra::kernels::simd
