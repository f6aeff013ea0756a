// A warp's share of attention in true fp32: 16 query rows, four to each group of 8 lanes. A lane has the logits of 4
// rows by every 8th key, and 4 rows by every 8th group of 4 channels of the output; weights go between them by
// shuffles.
#pragma once
#include "kernels/cuda/attention_mma.cuh"

namespace pyra::kernels::cuda {
namespace {

template <int D>
class SimtTile {
 public:
  using Element = float;
  static constexpr int kDim = D, kRows = 16, kPairs = D <= 64 ? 2 : 1;
  static constexpr int kStride = D + 4;  ///< an odd number of 16 bytes: 8 neighbouring keys lie in different banks
  static constexpr int kMaxThreads = 192, kMinBlocks = 2;  // 168 registers a thread
  static constexpr int kWarpsWanted = kMaxThreads / kWarp;

  __device__ __forceinline__ void start(const float* query, int first, int tokens, int pitch) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      query_[i] = query + size_t(min(first + 4 * group() + i, tokens - 1)) * pitch;
      top_[i] = kLowest;
      sum_[i] = 0.f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) out_[i][v] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }

  template <int Pairs>
  __device__ __forceinline__ void add(const float* keys, const float* values, const float* bias, float scale,
                                      float* logits) {
    float s[4][2 * Pairs] = {};
    multiply_keys<Pairs>(s, keys);
#pragma unroll
    for (int j = 0; j < 2 * Pairs; ++j) {
      const float b = bias[8 * j + column()];
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i][j] = fmaf(s[i][j], scale, b);
      if (logits != nullptr && group() == 0) logits[8 * j + column()] = s[0][j];
    }
    weigh<Pairs>(s);
    multiply_values<Pairs>(s, values);
  }

  __device__ __forceinline__ void finish(float* out, int first, int tokens, int pitch, const float* logits,
                                         float* class_row, float* log_sum) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      for (int step = 1; step < 8; step *= 2) sum_[i] += __shfl_xor_sync(kAllLanes, sum_[i], step);
      const int row = first + 4 * group() + i;
      if (log_sum != nullptr && column() == 0 && row < tokens) log_sum[row] = top_[i] + log2f(sum_[i]);
      sum_[i] = 1.f / sum_[i];
    }
    if (logits != nullptr) {
      __syncwarp();
      const float top = __shfl_sync(kAllLanes, top_[0], 0), inverse = __shfl_sync(kAllLanes, sum_[0], 0);
      for (int key = threadIdx.x % kWarp; key < tokens; key += kWarp)
        class_row[key] = exp2_fast(logits[key] - top) * inverse;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + 4 * group() + i;
      if (row >= tokens) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float4 o = out_[i][v];
        if (32 * v + 4 * column() < D)
          *reinterpret_cast<float4*>(out + size_t(row) * pitch + 32 * v + 4 * column()) =
              make_float4(o.x * sum_[i], o.y * sum_[i], o.z * sum_[i], o.w * sum_[i]);
      }
    }
  }

 private:
  static constexpr int kVectors = (D + 31) / 32;
  static __device__ __forceinline__ int group() {
    return threadIdx.x % kWarp / 8;
  }
  static __device__ __forceinline__ int column() {
    return threadIdx.x % 8;
  }

  template <int Pairs>
  __device__ __forceinline__ void multiply_keys(float (&s)[4][2 * Pairs], const float* keys) {
#pragma unroll 2
    for (int d = 0; d < D; d += 4) {
      float4 q[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = *reinterpret_cast<const float4*>(query_[i] + d);
#pragma unroll
      for (int j = 0; j < 2 * Pairs; ++j) {
        const float4 k = *reinterpret_cast<const float4*>(keys + (8 * j + column()) * kStride + d);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[i][j] = fmaf(q[i].x, k.x, s[i][j]);
          s[i][j] = fmaf(q[i].y, k.y, s[i][j]);
          s[i][j] = fmaf(q[i].z, k.z, s[i][j]);
          s[i][j] = fmaf(q[i].w, k.w, s[i][j]);
        }
      }
    }
  }

  /// s becomes 2^(s - top); what was summed follows the top where it rises.
  template <int Pairs>
  __device__ __forceinline__ void weigh(float (&s)[4][2 * Pairs]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float high = s[i][0];
#pragma unroll
      for (int j = 1; j < 2 * Pairs; ++j) high = fmaxf(high, s[i][j]);
#pragma unroll
      for (int step = 1; step < 8; step *= 2) high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, step));
      if (high > top_[i] + kSlack) {
        const float factor = exp2_fast(top_[i] - high);
        top_[i] = high;
        sum_[i] *= factor;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          float4& o = out_[i][v];
          o = make_float4(o.x * factor, o.y * factor, o.z * factor, o.w * factor);
        }
      }
#pragma unroll
      for (int j = 0; j < 2 * Pairs; ++j) {
        s[i][j] = exp2_fast(s[i][j] - top_[i]);
        sum_[i] += s[i][j];
      }
    }
  }

  template <int Pairs>
  __device__ __forceinline__ void multiply_values(const float (&s)[4][2 * Pairs], const float* values) {
#pragma unroll
    for (int j = 0; j < 2 * Pairs; ++j)
#pragma unroll 2
      for (int owner = 0; owner < 8; ++owner) {
        float weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) weight[i] = __shfl_sync(kAllLanes, s[i][j], 8 * group() + owner);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          // Lanes past the last channel repeat it and do not store.
          const int d = min(32 * v + 4 * column(), D - 4);
          const float4 x = *reinterpret_cast<const float4*>(values + (8 * j + owner) * kStride + d);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float4& o = out_[i][v];
            o = make_float4(fmaf(weight[i], x.x, o.x), fmaf(weight[i], x.y, o.y), fmaf(weight[i], x.z, o.z),
                            fmaf(weight[i], x.w, o.w));
          }
        }
      }
  }

  const float* query_[4];
  float4 out_[4][kVectors];
  float top_[4], sum_[4];
};

}  // namespace
}  // namespace pyra::kernels::cuda
