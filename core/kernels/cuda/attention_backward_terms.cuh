// What the ways of attention's gradient share. Those open to every GPU go over the head twice; in both passes a warp
// owns rows and goes over columns:
//   of keys     rows are keys, columns queries: dV += Pᵀ dO and dK += dSᵀ Q
//   of queries  rows are queries, columns keys: dQ += dS K
// and in both P = 2^(scale q k + a term of the row + a term of the column), where a key's term is log2(size) and a
// query's is -log_sum; a column or row that does not exist has the term -inf, so that its P and dS are 0.
#pragma once
#include <cmath>

#include "kernels/cuda/device.cuh"

namespace pyra::kernels::cuda {
namespace {

/// Rows of a head, `pitch` elements apart.
template <class T>
struct Operand {
  const T* at;
  int pitch;
  [[nodiscard]] __device__ __forceinline__ const T* row(int i) const { return at + size_t(i) * pitch; }
};

/// `sizes` are an image's, or null.
__device__ __forceinline__ float key_term(const float* sizes, int key, int tokens) {
  return key >= tokens ? -INFINITY : sizes == nullptr ? 0.f : log2f(sizes[key]);
}
/// `log_sum` is of a head.
__device__ __forceinline__ float query_term(const float* log_sum, int query, int tokens) {
  return query >= tokens ? -INFINITY : -log_sum[query];
}

/// delta[query] = sum over channels of dO ∘ out for queries from `first` to `end`, of which there are a multiple of 4;
/// 0 for those past the last. Eight lanes share a row and four rows are read at once, by all of the block's threads.
template <class T, int D>
__device__ __forceinline__ void load_delta(const Operand<T>& out, const Operand<T>& d_out, int first, int end,
                                           int tokens, float* delta) {
  constexpr int kPer = 16 / sizeof(T), kUnits = D / kPer, kAtOnce = 4;
  const int step = blockDim.x / 8, unit = threadIdx.x % 8;
  for (int base = first + threadIdx.x / kWarp * 4; base < end; base += kAtOnce * step) {
    const int own = base + threadIdx.x % kWarp / 8;
    float sum[kAtOnce] = {};
#pragma unroll
    for (int u = 0; u < kUnits; u += 8) {
      if (kUnits - u < 8 && unit >= kUnits - u) continue;
      Pack<T, kPer> a[kAtOnce], b[kAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const int row = min(own + r * step, tokens - 1);
        a[r] = *reinterpret_cast<const Pack<T, kPer>*>(out.row(row) + (u + unit) * kPer);
        b[r] = *reinterpret_cast<const Pack<T, kPer>*>(d_out.row(row) + (u + unit) * kPer);
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r)
#pragma unroll
        for (int i = 0; i < kPer; ++i) sum[r] = fmaf(to_float(a[r].value[i]), to_float(b[r].value[i]), sum[r]);
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 4);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
      const int row = own + r * step;
      if (unit == 0 && row < end) delta[row] = row < tokens ? sum[r] : 0.f;
    }
  }
}

/// Where a tile finds the terms of its rows: `sizes` of the image for keys (null: none), `log_sum` and `delta` of the
/// head for queries.
template <bool kKeys>
struct RowTerms {
  const float *sizes, *log_sum, *delta;
  int tokens;
  [[nodiscard]] __device__ __forceinline__ float shift(int row) const {
    return kKeys ? key_term(sizes, row, tokens) : query_term(log_sum, row, tokens);
  }
  [[nodiscard]] __device__ __forceinline__ float delta_of(int row) const {
    return kKeys || row >= tokens ? 0.f : delta[row];
  }
};

}  // namespace
}  // namespace pyra::kernels::cuda
