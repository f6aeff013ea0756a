// LoRA's thin products where a LayerNorm has the row in registers anyway (norm_train.cu): h = drop(y) Aᵀ of the norm's
// output, and on the way back what flows through A into its gradient.
//
// A warp owns a row as row.cuh lays it out: the sums are a row's own, in one fixed order. A, 24 KB for ViT-B, is read
// by every row from the L1 cache, 200 cycles of it, which a kernel that waits for memory has to spare. The loop over
// ranks is not unrolled: as one with the channels of all ranks in flight it took every register that it was given.
#pragma once
#include "kernels/cuda/norm_train.h"
#include "kernels/cuda/philox.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kLowWidth = 4;  // channels of a lane at a time: half of what a Philox block decides about

/// Of a lane's values of a row what is dropped, a bit each. A Philox block is two lanes' of one chunk: each of them
/// computes one chunk's of two, and they pass halves. Bits, and a loop, because the generator's round keys of an
/// unrolled one take 20 registers while the row is alive.
template <int kValues>
__device__ __forceinline__ uint32_t dropped_of_row(const DropoutMask& mask, int row, int channels, int lane) {
  static_assert(kValues <= 32 && kValues % (2 * kLowWidth) == 0);
  uint32_t bits = 0;
  if (!mask.drops()) return bits;
  const bool odd = lane % 2 == 1;
  const uint64_t first = uint64_t(row) * uint64_t(channels) + uint64_t(((odd ? kWarp : 0) + (lane & ~1)) * kLowWidth);
#pragma unroll 1
  for (int v = 0; v < kValues; v += 2 * kLowWidth) {
    const Dropped block = mask.dropped(first + uint64_t(v * kWarp));
    uint32_t own = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) own |= ((block.pair[w] & 1) | (block.pair[w] >> 15 & 2)) << (2 * w);
    const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? own & 15 : own >> 4, 1);
    bits |= (odd ? other | (own & 0xf0) : (own & 15) | other << 4) << v;
  }
  return bits;
}

[[nodiscard]] __device__ __forceinline__ float unless_dropped(float x, uint32_t bits, int v) {
  return (bits >> v & 1) != 0 ? 0.0f : x;
}

/// A row of A, the part that a lane owns; beyond the channels from its start.
template <int kWidth, int kValues>
__device__ __forceinline__ void load_rank(const NormLowRank& low, int rank, int channels, int lane,
                                          float (&a)[kValues]) {
  const float* row = low.a + rank * channels;
#pragma unroll
  for (int j = 0; j < kValues / kWidth; ++j) {
    const int c = (j * kWarp + lane) * kWidth;
    const float4 v = *reinterpret_cast<const float4*>(row + (c < channels ? c : 0));
    a[j * kWidth] = v.x, a[j * kWidth + 1] = v.y, a[j * kWidth + 2] = v.z, a[j * kWidth + 3] = v.w;
  }
}

[[nodiscard]] __device__ __forceinline__ float kept_scale(const Dropout& dropout) {
  return dropout.threshold != 0 ? dropout.scale : 1.0f;
}

/// y = normalised * weight + bias as store_affine has it, and h of what is stored, behind y and in the dense copy.
template <class T, int kWidth, int kValues>
__device__ __forceinline__ void store_affine_and_low(float (&x)[kValues], const AddNormCall& call, int channels,
                                                     int row, int lane, uint32_t dropped) {
  static_assert(kWidth == kLowWidth);
  const NormLowRank& low = call.low;
  T* const y = static_cast<T*>(call.y) + int64_t(row) * call.y_stride;
#pragma unroll
  for (int j = 0; j < kValues / kWidth; ++j) {
    const int c = (j * kWarp + lane) * kWidth;
    const bool inside = c < channels;
    float weight[kWidth], bias[kWidth], values[kWidth];
    load_floats<float, kWidth>(call.weight + (inside ? c : 0), weight);
    load_floats<float, kWidth>(call.bias + (inside ? c : 0), bias);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) values[e] = __fmaf_rn(x[j * kWidth + e], weight[e], bias[e]);
    const auto words = Words<T, kWidth>::of(values, 0);
    if (inside) words.write(y + c);
#pragma unroll
    for (int e = 0; e < kWidth; ++e)
      x[j * kWidth + e] = inside ? unless_dropped(words.value(e), dropped, j * kWidth + e) : 0.0f;
  }
  float own = 0;  // of column `lane`
#pragma unroll 1
  for (int r = 0; r < kNormRanks; ++r) {
    float a[kValues], part[4] = {};
    load_rank<kWidth>(low, r, channels, lane, a);
#pragma unroll
    for (int v = 0; v < kValues; ++v) part[v % 4] = __fmaf_rn(x[v], a[v], part[v % 4]);
    const float sum = warp_sum(__fadd_rn(__fadd_rn(part[0], part[1]), __fadd_rn(part[2], part[3])));
    if (lane == r) own = __fmul_rn(sum, kept_scale(low.dropout));
  }
  if (lane >= low.padded) return;
  const T h = from_float<T>(own);
  y[channels + lane] = h;
  static_cast<T*>(low.h_copy)[int64_t(row) * low.padded + lane] = h;
}

/// d_y += mask (d_h A), with d_h behind d_y in memory. Channels beyond the row get something: subtract_means drops it.
template <class T, int kWidth, int kValues>
__device__ __forceinline__ void add_low(float (&d_y)[kValues], const NormBackwardCall& call, int channels, int row,
                                        int lane, uint32_t dropped) {
  static_assert(kWidth == kLowWidth);
  const NormLowRank& low = call.low;
  const T* const d_h = static_cast<const T*>(call.d_y) + int64_t(row) * call.d_y_stride + channels;
  float through[kValues] = {};
#pragma unroll 1
  for (int r = 0; r < kNormRanks; ++r) {
    float a[kValues];
    load_rank<kWidth>(low, r, channels, lane, a);
    const float factor = to_float(d_h[r]);
#pragma unroll
    for (int v = 0; v < kValues; ++v) through[v] = __fmaf_rn(factor, a[v], through[v]);
  }
  const float scale = kept_scale(low.dropout);
#pragma unroll
  for (int v = 0; v < kValues; ++v) d_y[v] = __fmaf_rn(scale, unless_dropped(through[v], dropped, v), d_y[v]);
}

}  // namespace
}  // namespace pyra::kernels::cuda
