// Attention of one head backward, fp32; and forward in fp32.
#pragma once
#include "kernels/simd/attention_tile.h"

namespace pyra::kernels::simd {
namespace {

/// Probabilities and logit gradients of a block of queries, M queries at a time.
struct BlockTile {
  const AttentionBackwardCall& call;
  const float *keys, *values;  // panels
  float *probabilities, *gradients;
  int64_t first, padded;  // the block's first query

  template <int M>
  void run(int64_t row) const {
    float* p = probabilities + row * padded;
    float* g = gradients + row * padded;
    query_logits<M>(call.q + (first + row) * call.stride, call.stride, keys, call.head_dim, call.tokens, padded, p);
    query_logits<M>(call.dout + (first + row) * call.out_stride, call.out_stride, values, call.head_dim, call.tokens,
                    padded, g);
    for (int m = 0; m < M; ++m) logit_gradients(p + m * padded, g + m * padded, call.log_sum[first + row + m]);
    float* dq = call.dq + (first + row) * call.stride;
    for (int64_t d = 0; d < call.head_dim; d += kPanel) {
      if (call.head_dim - d > kLanes) {
        multiply_store<M, 2>(g, call.k + d, dq + d);
      } else {
        multiply_store<M, 1>(g, call.k + d, dq + d);
      }
    }
  }

  template <int M, int NV>
  PYRA_INLINE void multiply_store(const float* g, const float* k, float* dq) const {
    Vector sum[M][NV];
    clear(sum);
    multiply_add(g, padded, k, call.stride, call.tokens, sum);
    store_tile(dq, call.stride, sum);
  }

  /// One row: p = exp(logit - log_sum); g = scale p (g - p·g), from dL/dp to dL/d(q·k).
  void logit_gradients(float* p, float* g, float log_sum) const {
    const Vector shift = broadcast(-log_sum * kLog2E), scale = broadcast(call.scale * kLog2E);
    Vector dot = zero();
    for (int64_t j = 0; j < call.tokens; j += kLanes) {
      const Vector logit = fmadd(load(p + j), scale, load(call.bias + j));
      const Vector probability = exp2_of(add(logit, shift));
      store(p + j, probability);
      dot = fmadd(probability, load(g + j), dot);
    }
    const Vector mean = broadcast(sum_of(dot));
    for (int64_t j = 0; j < call.tokens; j += kLanes) {
      const Vector probability = multiply(load(p + j), broadcast(call.scale));
      store(g + j, multiply(probability, subtract(load(g + j), mean)));
    }
  }
};

/// target [tokens, head_dim] (+)= weightsᵀ source, M keys at a time; weights [queries, padded].
struct KeyTile {
  const float* weights;
  int64_t padded, queries;
  const float* source;
  int64_t source_stride;
  float* target;
  int64_t target_stride, head_dim;
  bool add;

  template <int M>
  void run(int64_t key) const {
    for (int64_t d = 0; d < head_dim; d += kPanel) {
      if (head_dim - d > kLanes) {
        columns<M, 2>(key, d);
      } else {
        columns<M, 1>(key, d);
      }
    }
  }

  template <int M, int NV>
  PYRA_INLINE void columns(int64_t key, int64_t d) const {
    Vector sum[M][NV];
    float* to = target + key * target_stride + d;
    if (add) {
      load_tile(to, target_stride, sum);
    } else {
      clear(sum);
    }
    multiply_add_transposed(weights + key, padded, source + d, source_stride, queries, sum);
    store_tile(to, target_stride, sum);
  }
};

void attention(const AttentionCall& call) {
  const int64_t padded = padded_tokens(call.tokens);
  auto* keys = reinterpret_cast<float*>(call.scratch);
  float* logits = keys + 2 * padded * call.head_dim;
  transpose_to_panels(call.k, call.stride * 4, call.tokens, call.head_dim, keys);
  for_row_tiles(call.tokens, QueryTile<float, float>{call, keys, static_cast<const float*>(call.v), call.stride, logits,
                                                     logits, padded});
}

void attention_backward(const AttentionBackwardCall& call) {
  const int64_t padded = padded_tokens(call.tokens), panels = padded * call.head_dim;
  auto* keys = reinterpret_cast<float*>(call.scratch);
  float* values = keys + panels;
  float* probabilities = values + panels;
  const int64_t block = call.tokens < kQueryBlock ? call.tokens : kQueryBlock;
  float* gradients = probabilities + block * padded;
  transpose_to_panels(call.k, call.stride * 4, call.tokens, call.head_dim, keys);
  transpose_to_panels(call.v, call.stride * 4, call.tokens, call.head_dim, values);
  for (int64_t first = 0; first < call.tokens; first += kQueryBlock) {
    const int64_t queries = call.tokens - first < kQueryBlock ? call.tokens - first : kQueryBlock;
    for_row_tiles(queries, BlockTile{call, keys, values, probabilities, gradients, first, padded});
    const bool add = first > 0;
    for_row_tiles(call.tokens, KeyTile{probabilities, padded, queries, call.dout + first * call.out_stride,
                                       call.out_stride, call.dv, call.stride, call.head_dim, add});
    for_row_tiles(call.tokens, KeyTile{gradients, padded, queries, call.q + first * call.stride, call.stride, call.dk,
                                       call.stride, call.head_dim, add});
  }
}

}  // namespace
}  // namespace pyra::kernels::simd
