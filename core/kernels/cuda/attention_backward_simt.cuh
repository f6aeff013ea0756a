// A warp's share of attention's gradient in true fp32: 16 rows (attention_backward_terms.cuh), four to each group of 8
// lanes. A lane has P and dS of 4 rows by every 8th column, and 4 rows by every 8th group of 4 channels of the
// gradients; weights go between them by shuffles.
#pragma once
#include "kernels/cuda/attention_backward_terms.cuh"
#include "kernels/cuda/attention_ptx.cuh"

namespace pyra::kernels::cuda {
namespace {

template <int D, bool kKeys_>
class SimtBackward {
 public:
  using Element = float;
  static constexpr bool kKeys = kKeys_;
  static constexpr int kDim = D, kRows = 16, kPairs = D <= 64 ? 2 : 1;
  static constexpr int kStride = D + 4;  ///< an odd number of 16 bytes: 8 neighbouring columns lie in different banks
  static constexpr int kMinBlocks = 2;

  __device__ __forceinline__ void start(const Operand<float>& x, const Operand<float>& z, const RowTerms<kKeys>& terms,
                                        int first, int tokens) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + 4 * group() + i, readable = min(row, tokens - 1);
      x_[i] = x.row(readable);
      z_[i] = z.row(readable);
      shift_[i] = terms.shift(row);
      delta_[i] = terms.delta_of(row);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) x_grad_[i][v] = z_grad_[i][v] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }

  template <int Pairs>
  __device__ __forceinline__ void add(const float* x_columns, const float* z_columns, const float* shift,
                                      const float* delta, float scale) {
    float p[4][2 * Pairs] = {}, ds[4][2 * Pairs] = {};
    multiply_rows<Pairs>(p, x_, x_columns);
    multiply_rows<Pairs>(ds, z_, z_columns);
#pragma unroll
    for (int j = 0; j < 2 * Pairs; ++j) {
      const float c = shift[8 * j + column()];
      const float d = kKeys ? delta[8 * j + column()] : 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[i][j] = exp2_fast(fmaf(p[i][j], scale, c + shift_[i]));
        ds[i][j] = p[i][j] * (ds[i][j] - (kKeys ? d : delta_[i]));
      }
    }
    multiply_columns<Pairs>(x_grad_, ds, x_columns);
    if constexpr (kKeys) multiply_columns<Pairs>(z_grad_, p, z_columns);
  }

  __device__ __forceinline__ void finish(float* x_grad, float* z_grad, int first, int tokens, int pitch, float factor) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + 4 * group() + i;
      if (row >= tokens) continue;
      store_row(x_grad + size_t(row) * pitch, x_grad_[i], factor);
      if constexpr (kKeys) store_row(z_grad + size_t(row) * pitch, z_grad_[i], 1.f);
    }
  }

 private:
  static constexpr int kVectors = (D + 31) / 32;
  using Sums = float4[4][kVectors];

  static __device__ __forceinline__ int group() {
    return threadIdx.x % kWarp / 8;
  }
  static __device__ __forceinline__ int column() {
    return threadIdx.x % 8;
  }

  static __device__ __forceinline__ void store_row(float* to, const float4 (&sums)[kVectors], float factor) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float4 o = sums[v];
      if (32 * v + 4 * column() < D)
        *reinterpret_cast<float4*>(to + 32 * v + 4 * column()) =
            make_float4(o.x * factor, o.y * factor, o.z * factor, o.w * factor);
    }
  }

  template <int Pairs>
  static __device__ __forceinline__ void multiply_rows(float (&s)[4][2 * Pairs], const float* const (&rows)[4],
                                                       const float* columns) {
#pragma unroll 2
    for (int d = 0; d < D; d += 4) {
      float4 a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = __ldg(reinterpret_cast<const float4*>(rows[i] + d));
#pragma unroll
      for (int j = 0; j < 2 * Pairs; ++j) {
        const float4 b = *reinterpret_cast<const float4*>(columns + (8 * j + column()) * kStride + d);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[i][j] = fmaf(a[i].x, b.x, s[i][j]);
          s[i][j] = fmaf(a[i].y, b.y, s[i][j]);
          s[i][j] = fmaf(a[i].z, b.z, s[i][j]);
          s[i][j] = fmaf(a[i].w, b.w, s[i][j]);
        }
      }
    }
  }

  template <int Pairs>
  static __device__ __forceinline__ void multiply_columns(Sums& sums, const float (&weights)[4][2 * Pairs],
                                                          const float* columns) {
#pragma unroll
    for (int j = 0; j < 2 * Pairs; ++j)
#pragma unroll 2
      for (int owner = 0; owner < 8; ++owner) {
        float weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) weight[i] = __shfl_sync(kAllLanes, weights[i][j], 8 * group() + owner);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          // Lanes past the last channel repeat it and do not store.
          const int d = min(32 * v + 4 * column(), D - 4);
          const float4 b = *reinterpret_cast<const float4*>(columns + (8 * j + owner) * kStride + d);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float4& o = sums[i][v];
            o = make_float4(fmaf(weight[i], b.x, o.x), fmaf(weight[i], b.y, o.y), fmaf(weight[i], b.z, o.z),
                            fmaf(weight[i], b.w, o.w));
          }
        }
      }
  }

  const float *x_[4], *z_[4];
  Sums x_grad_, z_grad_;
  float shift_[4], delta_[4];
};

}  // namespace
}  // namespace pyra::kernels::cuda
