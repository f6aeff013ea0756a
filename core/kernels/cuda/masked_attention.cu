// Attention under a soft mask, head by head, as described by masked_attention.h.
//
// A warp owns 16 queries of a head and goes over all keys once, 32 or 16 at a time (masked_attention.cuh), with the
// usual running maximum; a block's warps, up to 8 of one head, share the staged K and V. eps stands beside sums over
// exp(logit - max), so it is added when the maximum is known: out = (sum of e v + eps mean(v)) / (sum of e + eps). The
// mean of v is added up by the block while it passes. The class row's logits stay in shared memory until then.
// Nothing is added across warps, so every sum has one order.
//
// Bytes moved: qkv once (K and V again from L2 for every further block of a head: one at 128 tokens, two at 256), out
// once, B H N (4 + 3) fp32. Bound by FMA: 4 B H N² D operations on CUDA cores in every type; a search's step is some
// percent attention, and probabilities that are not rounded make its mask's gradient exact.
#include "kernels/cuda/masked_attention.h"

#include <cmath>

#include "base/error.h"
#include "kernels/cuda/masked_attention.cuh"

namespace pyra::kernels::cuda {
namespace {

struct Job {
  MaskedAttentionCall call;
  int splits, channels;
  float scale;  ///< of a product of q and k, to powers of two
};

/// A chunk of keys and values, and what goes with each key.
template <int D>
struct Stage {
  static constexpr int kFloats = MaskTile<D>::kColumns * MaskTile<D>::kStride;
  alignas(16) float keys[kFloats], values[kFloats];
  float bias[MaskTile<D>::kColumns], mask[MaskTile<D>::kColumns];
};

/// A warp's 16 queries on their way over the keys.
template <class T, int D>
struct Queries {
  static constexpr int kColumnsOfLane = MaskTile<D>::kColumnsOfLane;
  const T* rows[kRowsOfLane];
  RowSums<D> out;
  float top[kRowsOfLane], sum[kRowsOfLane];  // sum: of this lane's keys
  float best[kRowsOfLane];                   // of this lane's keys
  int peak[kRowsOfLane];

  __device__ __forceinline__ void start(const T* query, int64_t pitch, int first, int tokens) {
    find_rows(rows, query, pitch, first, tokens);
    clear<D>(out);
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      top[i] = best[i] = -INFINITY;
      sum[i] = 0.f;
      peak[i] = 0;
    }
  }

  /// The chunk that begins at `key`; `logits`: where those of the first row go, or null.
  __device__ __forceinline__ void add(const Stage<D>& stage, int first, int key, float scale, float* logits) {
    float s[kRowsOfLane][kColumnsOfLane] = {};
    multiply_rows<D>(s, rows, stage.keys);
#pragma unroll
    for (int j = 0; j < kColumnsOfLane; ++j) {
      const int column = kLanesOfGroup * j + column_of_lane();
      const float bias = stage.bias[column];
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i) {
        s[i][j] = fmaf(s[i][j], scale, bias);
        if (s[i][j] > best[i]) best[i] = s[i][j], peak[i] = key + column;
      }
      if (logits && group_of_lane() == 0) logits[key + column] = s[0][j];  // room for the last chunk's end too
    }
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) weigh(stage, i, first + kRowsOfLane * group_of_lane() + i, key, s[i]);
    multiply_columns<D>(out, s, stage.values);
  }

  /// s becomes e; what was summed follows the maximum where it rises.
  __device__ __forceinline__ void weigh(const Stage<D>& stage, int i, int row, int key, float (&s)[kColumnsOfLane]) {
    float high = s[0];
#pragma unroll
    for (int j = 1; j < kColumnsOfLane; ++j) high = fmaxf(high, s[j]);
#pragma unroll
    for (int step = 1; step < kLanesOfGroup; step *= 2) high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, step));
    // Finite: every chunk has a key that exists.
    high = fmaxf(high, top[i]);
    const float factor = exp2_fast(top[i] - high);
    top[i] = high;
    sum[i] *= factor;
#pragma unroll
    for (int v = 0; v < MaskTile<D>::kVectors; ++v) {
      float4& o = out[i][v];
      o = make_float4(o.x * factor, o.y * factor, o.z * factor, o.w * factor);
    }
#pragma unroll
    for (int j = 0; j < kColumnsOfLane; ++j) {
      const int column = kLanesOfGroup * j + column_of_lane();
      const float bare = exp2_fast(s[j] - high);
      s[j] = key + column == row ? bare : bare * stage.mask[column];
      sum[i] += s[j];
    }
  }

  /// Of a group's lanes the first that has the largest logit.
  __device__ __forceinline__ int peak_of(int i) const {
    float value = best[i];
    int index = peak[i];
#pragma unroll
    for (int step = 1; step < kLanesOfGroup; step *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, value, step);
      const int at = __shfl_xor_sync(kAllLanes, index, step);
      if (other > value || (other == value && at < index)) value = other, index = at;
    }
    return index;
  }
};

/// The class row's probabilities, by the warp that has it.
__device__ __forceinline__ void store_class_row(const float* logits, const float* mask, float top, float inverse,
                                                int tokens, float* to) {
  __syncwarp();
  const float eps = kMaskEps / float(tokens);
  for (int key = int(threadIdx.x) % kWarp; key < tokens; key += kWarp)
    to[key] = (exp2_fast(logits[key] - top) * (key == 0 ? 1.f : mask[key]) + eps) * inverse;
}

template <class T, int D>
__global__ void __launch_bounds__(kMostWarps* kWarp) masked_attention_kernel(const Job job) {
  using Tile = MaskTile<D>;
  __shared__ Stage<D> stage;
  __shared__ __align__(16) float mean[D];
  __shared__ float logits[kMostMaskedTokens];
  const MaskedAttentionCall& call = job.call;
  const int tokens = call.tokens, thread = int(threadIdx.x);
  const MaskedPlace place(job.splits, call.heads, tokens);
  const int64_t pitch = 3 * int64_t(job.channels), row0 = int64_t(place.image) * tokens;
  const T* const query = static_cast<const T*>(call.qkv) + row0 * pitch + place.head * D;
  const T *const key = query + job.channels, *const value = key + job.channels;
  const float* const sizes = call.sizes ? call.sizes + row0 : nullptr;
  const float* const mask = call.mask + row0;

  Queries<T, D> tile;
  if (place.active) tile.start(query, pitch, place.first, tokens);
  float* const class_logits = place.first == 0 ? logits : nullptr;
  float value_sum = 0.f;  // of channel `thread`
  for (int first = 0; first < tokens; first += Tile::kColumns) {
    __syncthreads();  // the chunk before has been read
    stage_columns<D>(key, pitch, first, tokens, stage.keys);
    stage_columns<D>(value, pitch, first, tokens, stage.values);
    if (thread < Tile::kColumns) {
      stage.bias[thread] = key_bias(sizes, first + thread, tokens);
      stage.mask[thread] = key_mask(mask, first + thread, tokens);
    }
    __syncthreads();
    if (thread < D)
      for (int c = 0; c < Tile::kColumns; ++c) value_sum += stage.values[c * Tile::kStride + thread];
    if (place.active) tile.add(stage, place.first, first, job.scale, class_logits);
  }
  if (thread < D) {
    mean[thread] = value_sum / float(tokens);
    if (place.leads) call.value_mean[int64_t(place.image) * job.channels + place.head * D + thread] = mean[thread];
  }
  __syncthreads();
  if (!place.active) return;

  T* const out = static_cast<T*>(call.out) + row0 * job.channels + place.head * D;
  float inverse[kRowsOfLane];
  int peak[kRowsOfLane];
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) {  // the whole warp's, so before rows that are not there go their own way
    inverse[i] = 1.f / (group_sum(tile.sum[i]) + kMaskEps);
    peak[i] = tile.peak_of(i);
  }
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) {
    const int row = place.first + kRowsOfLane * group_of_lane() + i;
    if (row >= tokens) continue;
    if (column_of_lane() == 0) {
      call.top[place.rows + row] = tile.top[i];
      call.inverse[place.rows + row] = inverse[i];
      call.peak[place.rows + row] = peak[i];
    }
    store_head<D>(out + int64_t(row) * job.channels, tile.out[i], [&](const float4& o, int d) {
      const float4 m = *reinterpret_cast<const float4*>(mean + d);
      const float scale = inverse[i];
      return make_float4(fmaf(kMaskEps, m.x, o.x) * scale, fmaf(kMaskEps, m.y, o.y) * scale,
                         fmaf(kMaskEps, m.z, o.z) * scale, fmaf(kMaskEps, m.w, o.w) * scale);
    });
  }
  __syncwarp();
  const float top = __shfl_sync(kAllLanes, tile.top[0], 0), scale = __shfl_sync(kAllLanes, inverse[0], 0);
  if (place.first == 0) store_class_row(logits, mask, top, scale, tokens, call.class_rows + place.rows);
}

void check(const MaskedAttentionCall& call) {
  constexpr const char* kWho = "masked_attention";
  check_masked(kWho, call.batch, call.tokens, call.heads, call.head_dim, call.dtype);
  if (call.batch == 0) return;
  check_pointer(kWho, "qkv", call.qkv);
  check_pointer(kWho, "out", call.out);
  check_pointer(kWho, "mask", call.mask);
  check_pointer(kWho, "class_rows", call.class_rows);
  check_pointer(kWho, "top", call.top);
  check_pointer(kWho, "inverse", call.inverse);
  check_pointer(kWho, "peak", call.peak);
  check_pointer(kWho, "value_mean", call.value_mean);
}

}  // namespace

void masked_attention(const MaskedAttentionCall& call, cudaStream_t stream) {
  check(call);
  if (call.batch == 0) return;
  const MaskedGrid grid = masked_grid("masked_attention", call.batch, call.heads, call.tokens);
  const Job job{call, grid.splits, call.heads * call.head_dim, float(kLog2E / std::sqrt(double(call.head_dim)))};
  with_type(call.dtype, [&](auto type) {
    with_head_dim(call.head_dim, [&](auto dim) {
      masked_attention_kernel<decltype(type), decltype(dim)::kDim>
          <<<grid.blocks, unsigned(grid.warps * kWarp), 0, stream>>>(job);
    });
  });
  PYRA_CUDA_LAUNCHED();
}

}  // namespace pyra::kernels::cuda
