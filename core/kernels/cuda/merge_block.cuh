// What the blocks of merge.cu are made of: their shape, their shared memory, and where a row's values stand in it.
#pragma once
#include <algorithm>

#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/merge.h"
#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kSlotFloats = 12 << 10;  // two blocks of 48 KB and their plans fit a multiprocessor

/// What an instance of the kernel is made of: element types, values of a row in a lane, and whether blocks are so few
/// that each has a multiprocessor of its own. Then latencies decide: twice the warps, the image's keep and sizes staged
/// beside the plan, for one wait instead of three, and gates of many pairs by a cluster.
template <class Residual_, class Compute_, class Row, bool kLone_>
struct Shape {
  using Residual = Residual_;
  using Compute = Compute_;
  static constexpr int kValues = Row::kValues;
  static constexpr int kWidth = kVectorOf<Residual, Compute>;
  static constexpr int kChunks = kValues / kWidth;
  static constexpr int kPositions = kValues * kWarp;  // channels, padded
  // Registers decide: a lane holds a row in fp32 and another as it comes. 64, 80, 168 or 255 of them.
  static constexpr int kHeld = kValues + kValues * int(sizeof(Residual)) / 4;
  static constexpr bool kLone = kLone_;
  static constexpr int kShared = kHeld <= 48 ? 2 : 1;  // blocks on a multiprocessor, if many
  static constexpr int kBlocks = kLone ? 1 : kShared;
  static constexpr int kWarps = (kHeld <= 36 ? 16 : kHeld <= 96 ? 12 : 8) * kShared / kBlocks;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kMostSlots = kSlotFloats * kShared / kBlocks / kPositions;
  static constexpr int kSlots = kMostSlots < kWarps ? kMostSlots : kWarps;
  // Lone blocks may form a cluster that shares the gate, each a share of the positions.
  static constexpr int kSharers = kMostClustered, kShare = kPositions / kSharers;
  static constexpr bool kMayShare = kLone && kShare <= kThreads;
  using Vector = Words<Residual, kWidth>;
  [[nodiscard]] __device__ __forceinline__ static int channels(const MergeCall& call) {
    return Row::channels(call.channels);
  }
  using Raw = RawRow<Residual, kValues, kWidth>;
};

/// A block's shared memory: arrays of the image's plan, keep of the slice, and with a gate rows in the order of
/// `position`. Addresses follow from two numbers, so that they cost no registers.
template <class S>
struct Shared {
  float* memory;
  int merged, slice;  ///< of a lone block: kept, all of it

  static constexpr int kArrays = 8;
  [[nodiscard]] static size_t bytes(const MergeCall& call, int slice, bool together) {
    const size_t rows = call.gate_a == nullptr ? 0 : size_t(S::kSlots + 2) * S::kPositions + 4;
    const size_t columns = together ? size_t(std::min(call.merged, S::kSlots * S::kSharers)) * S::kShare : 0;
    return 4 * (size_t(rows_at(call.merged, slice)) + rows + (S::kLone ? size_t(call.tokens) : 0) + columns);
  }
  [[nodiscard]] __host__ __device__ static int rows_at(int merged, int slice) {
    return (kArrays * merged + slice + 3) & ~3;
  }
  __device__ float* source_unit() const { return memory; }                            // [R] u of the source
  __device__ float* destination_unit() const { return memory + merged; }              // [R] u of the destination
  __device__ float* weight() const { return memory + 2 * merged; }                    // [R] src_weight u
  __device__ float* growth() const { return memory + 3 * merged; }                    // [R] added to the size
  __device__ float* token_gate() const { return memory + 4 * merged; }                // [R] w2
  __device__ int* source_token() const { return ints(5); }                            // [R] src
  __device__ int* destination_token() const { return ints(6); }                       // [R] keep[dst]
  __device__ int* destination() const { return ints(7); }                             // [R] dst
  __device__ int* kept() const { return ints(8); }                                    // [slice] keep
  __device__ float* channel_gate() const { return memory + rows_at(merged, slice); }  // [kPositions] w1
  __device__ float* gate_weight_b() const { return channel_gate() + S::kPositions; }  // [kPositions] weight b
  __device__ float* gate_row(int slot) const {                                        // [kSlots][kPositions] a[i] p
    return gate_weight_b() + (slot + 1) * S::kPositions;
  }
  __device__ float* gate_sums() const { return gate_row(S::kSlots); }  // sum of bias b, sum of a
  __device__ float* image_sizes(bool gated) const {                    // [tokens], of a lone block
    return gated ? gate_sums() + 4 : channel_gate();
  }
  __device__ float* gate_columns(int tokens) const {  // [pairs of a round][kShare] a[i] p, of a cluster's block
    return image_sizes(true) + tokens;
  }

 private:
  __device__ int* ints(int array) const { return reinterpret_cast<int*>(memory + array * merged); }
};

/// Where a lane's vector of 4 values stands in a row in shared memory: a warp's accesses of 16 bytes are contiguous.
__device__ __forceinline__ int position(int quad, int lane) {
  return (quad * kWarp + lane) * 4;
}

template <class S>
__device__ __forceinline__ const typename S::Residual* row_of(const MergeCall& call, int image, int token) {
  return static_cast<const typename S::Residual*>(call.x) + (int64_t(image) * call.tokens + token) * S::channels(call);
}

__device__ __forceinline__ float size_of_token(const MergeCall& call, int image, int token) {
  return call.sizes ? call.sizes[int64_t(image) * call.tokens + token] : 1.0f;
}

/// The channel of a lane's quad of values; beyond the row where the vector is.
template <class S>
__device__ __forceinline__ int channel_of(int quad, int lane) {
  constexpr int kQuadsOfVector = S::kWidth / 4;
  return (quad / kQuadsOfVector * kWarp + lane) * S::kWidth + quad % kQuadsOfVector * 4;
}

/// Brings a row that a warp will read near.
template <class S>
__device__ __forceinline__ void fetch_row(const typename S::Residual* row, int channels, int lane) {
  constexpr int kLine = 128 / sizeof(typename S::Residual);
  for (int c = lane * kLine; c < channels; c += kWarp * kLine) asm volatile("prefetch.global.L1 [%0];" ::"l"(row + c));
}

}  // namespace
}  // namespace pyra::kernels::cuda
