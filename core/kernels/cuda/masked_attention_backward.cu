// The gradient of attention under a soft mask, head by head, as described by masked_attention.h.
//
// Three launches. terms: a warp a query and head, two dot products of a row. Then two passes (masked_attention.cuh): in
// one a warp owns 16 keys and sums their dK, dV and d_mask over all queries, in the other 16 queries and sums their dQ
// over all keys. Every sum stays in one warp's registers in one order, nothing is added across warps; the price is that
// logits and dO Vᵀ are multiplied twice.
//
// Bytes moved: qkv, out and dO once (chunks again from L2 for every further block of a head), d_qkv once, 7 B H N fp32.
// Bound by FMA: 14 B H N² D operations on CUDA cores.
#include <cmath>

#include "base/error.h"
#include "kernels/cuda/masked_attention.cuh"
#include "kernels/cuda/masked_attention.h"

namespace pyra::kernels::cuda {
namespace {

struct Job {
  MaskedAttentionBackwardCall call;
  int splits, channels;
  float scale;   ///< of a product of q and k, to powers of two
  float factor;  ///< of dQ and dK: 1 / sqrt(D)
};

constexpr int kTermWarps = 8;

/// rowsum(dO ∘ out), and what the row's logits sum up to: eps (that - dO mean(v)) / Z.
template <class T>
__global__ void __launch_bounds__(kTermWarps* kWarp) terms_kernel(const Job job) {
  const MaskedAttentionBackwardCall& call = job.call;
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t item = int64_t(blockIdx.x) * kTermWarps + int(threadIdx.x) / kWarp;
  if (item >= int64_t(call.batch) * call.tokens * call.heads) return;  // of the whole warp
  const int head = int(item % call.heads);
  const int64_t row = item / call.heads, image = row / call.tokens;
  const T* const d_out = static_cast<const T*>(call.d_out) + row * job.channels + head * call.head_dim;
  const T* const out = static_cast<const T*>(call.out) + row * job.channels + head * call.head_dim;
  const float* const mean = call.value_mean + image * job.channels + head * call.head_dim;
  float delta = 0.f, along_mean = 0.f;
  for (int d = lane; d < call.head_dim; d += kWarp) {
    const float given = to_float(d_out[d]);
    delta = fmaf(given, to_float(out[d]), delta);
    along_mean = fmaf(given, mean[d], along_mean);
  }
  delta = warp_sum(delta);
  along_mean = warp_sum(along_mean);
  if (lane != 0) return;
  const int64_t to = (image * call.heads + head) * call.tokens + row % call.tokens;
  call.delta[to] = delta;
  call.correction[to] = kMaskEps * (delta - along_mean) * call.inverse[to];
}

/// What backward knows of a query.
struct QueryTerms {
  float top, inverse, delta, correction;
  int peak;

  /// Of one past the last: whatever it is multiplied with is nothing.
  __device__ __forceinline__ static QueryTerms none() { return {0.f, 0.f, 0.f, 0.f, -1}; }
  __device__ __forceinline__ static QueryTerms of(const MaskedAttentionBackwardCall& call, int64_t at) {
    return {call.top[at], call.inverse[at], call.delta[at], call.correction[at], call.peak[at]};
  }
};

/// Where query and key meet: e before the mask, what mask and exponential share, and the gradient of the logit.
struct Meeting {
  float bare, weight, shared, d_logit;
  bool own;  // the token meets itself
  __device__ __forceinline__ Meeting(const QueryTerms& q, int query, int key, float logit, float mask,
                                     float d_probability)
      : bare(exp2_fast(logit - q.top)), own(query == key) {
    weight = own ? 1.f : mask;
    shared = (d_probability - q.delta) * q.inverse * bare;
    d_logit = shared * weight - (key == q.peak ? q.correction : 0.f);
  }
};

/// A warp's 16 queries on their way over the keys: dQ.
template <class T, int D>
struct QueryRows {
  static constexpr int kColumnsOfLane = MaskTile<D>::kColumnsOfLane;
  struct Stage {
    alignas(16) float x[MaskTile<D>::kColumns * MaskTile<D>::kStride], z[MaskTile<D>::kColumns * MaskTile<D>::kStride];
    float bias[MaskTile<D>::kColumns], mask[MaskTile<D>::kColumns];
  };
  const T *query[kRowsOfLane], *d_out[kRowsOfLane];
  QueryTerms terms[kRowsOfLane];
  RowSums<D> d_query;

  __device__ __forceinline__ void start(const Job& job, const MaskedPlace& place, const T* q, const T* d_o,
                                        int64_t pitch) {
    const int tokens = job.call.tokens;
    find_rows(query, q, pitch, place.first, tokens);
    find_rows(d_out, d_o, job.channels, place.first, tokens);
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i)
      terms[i] =
          QueryTerms::of(job.call, place.rows + min(place.first + kRowsOfLane * group_of_lane() + i, tokens - 1));
    clear<D>(d_query);
  }

  __device__ __forceinline__ void add(const Stage& stage, int first, int key, float scale) {
    float s[kRowsOfLane][kColumnsOfLane] = {}, dp[kRowsOfLane][kColumnsOfLane] = {};
    multiply_rows<D>(s, query, stage.x);
    multiply_rows<D>(dp, d_out, stage.z);
#pragma unroll
    for (int j = 0; j < kColumnsOfLane; ++j) {
      const int column = kLanesOfGroup * j + column_of_lane();
      const float bias = stage.bias[column], mask = stage.mask[column];
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i) {
        const Meeting here(terms[i], first + kRowsOfLane * group_of_lane() + i, key + column,
                           fmaf(s[i][j], scale, bias), mask, dp[i][j]);
        s[i][j] = here.d_logit;
      }
    }
    multiply_columns<D>(d_query, s, stage.x);
  }
};

/// A warp's 16 keys on their way over the queries: dK, dV and the gradient of their masks.
template <class T, int D>
struct KeyRows {
  static constexpr int kColumnsOfLane = MaskTile<D>::kColumnsOfLane;
  struct Stage {
    alignas(16) float x[MaskTile<D>::kColumns * MaskTile<D>::kStride], z[MaskTile<D>::kColumns * MaskTile<D>::kStride];
    QueryTerms terms[MaskTile<D>::kColumns];
  };
  const T *key[kRowsOfLane], *value[kRowsOfLane];
  float bias[kRowsOfLane], mask[kRowsOfLane], d_mask[kRowsOfLane];
  RowSums<D> d_key, d_value;

  __device__ __forceinline__ void start(const MaskedPlace& place, const T* k, const T* v, int64_t pitch,
                                        const float* sizes, const float* masks, int tokens) {
    find_rows(key, k, pitch, place.first, tokens);
    find_rows(value, v, pitch, place.first, tokens);
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      const int row = min(place.first + kRowsOfLane * group_of_lane() + i, tokens - 1);
      bias[i] = key_bias(sizes, row, tokens);
      mask[i] = key_mask(masks, row, tokens);
      d_mask[i] = 0.f;
    }
    clear<D>(d_key);
    clear<D>(d_value);
  }

  __device__ __forceinline__ void add(const Stage& stage, int first, int query, float scale, float eps) {
    float p[kRowsOfLane][kColumnsOfLane] = {}, ds[kRowsOfLane][kColumnsOfLane] = {};
    multiply_rows<D>(p, key, stage.x);
    multiply_rows<D>(ds, value, stage.z);
#pragma unroll
    for (int j = 0; j < kColumnsOfLane; ++j) {
      const int column = kLanesOfGroup * j + column_of_lane();
      const QueryTerms terms = stage.terms[column];
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i) {
        const Meeting here(terms, query + column, first + kRowsOfLane * group_of_lane() + i,
                           fmaf(p[i][j], scale, bias[i]), mask[i], ds[i][j]);
        p[i][j] = fmaf(here.bare, here.weight, eps) * terms.inverse;
        ds[i][j] = here.d_logit;
        if (!here.own) d_mask[i] += here.shared;
      }
    }
    multiply_columns<D>(d_key, ds, stage.x);
    multiply_columns<D>(d_value, p, stage.z);
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kMostWarps* kWarp) query_kernel(const Job job) {
  using Rows = QueryRows<T, D>;
  using Tile = MaskTile<D>;
  __shared__ typename Rows::Stage stage;
  const MaskedAttentionBackwardCall& call = job.call;
  const int tokens = call.tokens, thread = int(threadIdx.x);
  const MaskedPlace place(job.splits, call.heads, tokens);
  const int64_t pitch = 3 * int64_t(job.channels), row0 = int64_t(place.image) * tokens;
  const T* const query = static_cast<const T*>(call.qkv) + row0 * pitch + place.head * D;
  const T *const key = query + job.channels, *const value = key + job.channels;
  const T* const d_out = static_cast<const T*>(call.d_out) + row0 * job.channels + place.head * D;
  Rows tile;
  if (place.active) tile.start(job, place, query, d_out, pitch);
  for (int first = 0; first < tokens; first += Tile::kColumns) {
    __syncthreads();  // the chunk before has been read
    stage_columns<D>(key, pitch, first, tokens, stage.x);
    stage_columns<D>(value, pitch, first, tokens, stage.z);
    if (thread < Tile::kColumns) {
      stage.bias[thread] = key_bias(call.sizes ? call.sizes + row0 : nullptr, first + thread, tokens);
      stage.mask[thread] = key_mask(call.mask + row0, first + thread, tokens);
    }
    __syncthreads();
    if (place.active) tile.add(stage, place.first, first, job.scale);
  }
  if (!place.active) return;
  T* const to = static_cast<T*>(call.d_qkv) + row0 * pitch + place.head * D;
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) {
    const int row = place.first + kRowsOfLane * group_of_lane() + i;
    if (row >= tokens) continue;
    store_head<D>(to + row * pitch, tile.d_query[i], [&](const float4& o, int) {
      return make_float4(o.x * job.factor, o.y * job.factor, o.z * job.factor, o.w * job.factor);
    });
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kMostWarps* kWarp) key_kernel(const Job job) {
  using Rows = KeyRows<T, D>;
  using Tile = MaskTile<D>;
  __shared__ typename Rows::Stage stage;
  const MaskedAttentionBackwardCall& call = job.call;
  const int tokens = call.tokens, thread = int(threadIdx.x);
  const MaskedPlace place(job.splits, call.heads, tokens);
  const int64_t pitch = 3 * int64_t(job.channels), row0 = int64_t(place.image) * tokens;
  const T* const query = static_cast<const T*>(call.qkv) + row0 * pitch + place.head * D;
  const T *const key = query + job.channels, *const value = key + job.channels;
  const T* const d_out = static_cast<const T*>(call.d_out) + row0 * job.channels + place.head * D;
  Rows tile;
  if (place.active)
    tile.start(place, key, value, pitch, call.sizes ? call.sizes + row0 : nullptr, call.mask + row0, tokens);
  for (int first = 0; first < tokens; first += Tile::kColumns) {
    __syncthreads();  // the chunk before has been read
    stage_columns<D>(query, pitch, first, tokens, stage.x);
    stage_columns<D>(d_out, job.channels, first, tokens, stage.z);
    if (thread < Tile::kColumns)
      stage.terms[thread] =
          first + thread < tokens ? QueryTerms::of(call, place.rows + first + thread) : QueryTerms::none();
    __syncthreads();
    if (place.active) tile.add(stage, place.first, first, job.scale, kMaskEps / float(tokens));
  }
  if (!place.active) return;
  T* const to = static_cast<T*>(call.d_qkv) + row0 * pitch + job.channels + place.head * D;
  float d_mask[kRowsOfLane];
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) d_mask[i] = group_sum(tile.d_mask[i]);
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) {
    const int row = place.first + kRowsOfLane * group_of_lane() + i;
    if (row >= tokens) continue;
    if (column_of_lane() == 0) call.d_mask_rows[place.rows + row] = d_mask[i];
    store_head<D>(to + row * pitch, tile.d_key[i], [&](const float4& o, int) {
      return make_float4(o.x * job.factor, o.y * job.factor, o.z * job.factor, o.w * job.factor);
    });
    store_head<D>(to + row * pitch + job.channels, tile.d_value[i], [](const float4& o, int) { return o; });
  }
}

void check(const MaskedAttentionBackwardCall& call) {
  constexpr const char* kWho = "masked_attention_backward";
  check_masked(kWho, call.batch, call.tokens, call.heads, call.head_dim, call.dtype);
  if (call.batch == 0) return;
  check_pointer(kWho, "qkv", call.qkv);
  check_pointer(kWho, "mask", call.mask);
  check_pointer(kWho, "out", call.out);
  check_pointer(kWho, "top", call.top);
  check_pointer(kWho, "inverse", call.inverse);
  check_pointer(kWho, "peak", call.peak);
  check_pointer(kWho, "value_mean", call.value_mean);
  check_pointer(kWho, "d_out", call.d_out);
  check_pointer(kWho, "delta", call.delta);
  check_pointer(kWho, "correction", call.correction);
  check_pointer(kWho, "d_qkv", call.d_qkv);
  check_pointer(kWho, "d_mask_rows", call.d_mask_rows);
}

template <class T>
void launch_terms(const Job& job, cudaStream_t stream) {
  const int64_t items = int64_t(job.call.batch) * job.call.tokens * job.call.heads;
  terms_kernel<T><<<unsigned((items + kTermWarps - 1) / kTermWarps), kTermWarps * kWarp, 0, stream>>>(job);
  PYRA_CUDA_LAUNCHED();
}

}  // namespace

void masked_attention_backward(const MaskedAttentionBackwardCall& call, cudaStream_t stream) {
  check(call);
  if (call.batch == 0) return;
  const MaskedGrid grid = masked_grid("masked_attention_backward", call.batch, call.heads, call.tokens);
  const double factor = 1.0 / std::sqrt(double(call.head_dim));
  const Job job{call, grid.splits, call.heads * call.head_dim, float(kLog2E * factor), float(factor)};
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    launch_terms<T>(job, stream);
    with_head_dim(call.head_dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::kDim;
      const auto threads = unsigned(grid.warps * kWarp);
      key_kernel<T, kDim><<<grid.blocks, threads, 0, stream>>>(job);
      query_kernel<T, kDim><<<grid.blocks, threads, 0, stream>>>(job);
    });
  });
  PYRA_CUDA_LAUNCHED();
}

}  // namespace pyra::kernels::cuda
