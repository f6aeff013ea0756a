// What attention under a soft mask shares with its gradient: a warp's tile of 16 rows against a chunk of columns, in
// fp32 whatever the elements.
//
// A tile's rows are four to each group of 8 lanes. A lane has the products of 4 rows with every 8th column, and of 4
// rows every 8th group of 4 channels of a result; weights go between lanes by shuffles. Columns come through shared
// memory as fp32, one chunk at a time for the whole block.
#pragma once
#include <algorithm>

#include "kernels/cuda/attention_ptx.cuh"
#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr float kMaskEps = 1e-6f;
constexpr double kLog2E = 1.4426950408889634;
constexpr int kTileRows = 16, kRowsOfLane = 4, kLanesOfGroup = 8;
constexpr int kLeastWarps = 4;  // a thread for each channel of a head, and for each column of a chunk
constexpr int kMostWarps = 8;
constexpr int kMostMaskedTokens = 1024;

/// How a head of D channels is cut.
template <int D>
struct MaskTile {
  static constexpr int kColumns = D <= 64 ? 32 : 16;  ///< of a chunk
  static constexpr int kColumnsOfLane = kColumns / kLanesOfGroup;
  static constexpr int kStride = D + 4;  ///< an odd number of 16 bytes: 8 neighbouring columns lie in different banks
  static constexpr int kVectors = (D + 31) / 32;  ///< groups of 4 channels a lane has of a row
  static_assert(D % 16 == 0 && D <= kLeastWarps * kWarp && kColumns <= kLeastWarps * kWarp);
};

__device__ __forceinline__ int group_of_lane() {
  return int(threadIdx.x) % kWarp / kLanesOfGroup;
}
__device__ __forceinline__ int column_of_lane() {
  return int(threadIdx.x) % kLanesOfGroup;
}

template <class T>
__device__ __forceinline__ float4 load4(const T* from) {
  float value[4];
  load_floats<T, 4>(from, value);
  return make_float4(value[0], value[1], value[2], value[3]);
}

/// This group's four rows of a tile, those past the last token the last one again.
template <class T>
__device__ __forceinline__ void find_rows(const T* (&rows)[kRowsOfLane], const T* matrix, int64_t pitch, int first,
                                          int tokens) {
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i)
    rows[i] = matrix + min(first + kRowsOfLane * group_of_lane() + i, tokens - 1) * pitch;
}

/// A chunk of columns to shared memory, zeros past the last token. By all threads; the caller has the barriers.
template <int D, class T>
__device__ __forceinline__ void stage_columns(const T* matrix, int64_t pitch, int first, int tokens, float* columns) {
  using Tile = MaskTile<D>;
  constexpr int kUnits = D / 4;
  for (int item = int(threadIdx.x); item < Tile::kColumns * kUnits; item += int(blockDim.x)) {
    const int column = item / kUnits, unit = item % kUnits * 4;
    float4 value = make_float4(0.f, 0.f, 0.f, 0.f);
    if (first + column < tokens) value = load4(matrix + (first + column) * pitch + unit);
    *reinterpret_cast<float4*>(columns + column * Tile::kStride + unit) = value;
  }
}

/// sums += rows columnsᵀ.
template <int D, class T>
__device__ __forceinline__ void multiply_rows(float (&sums)[kRowsOfLane][MaskTile<D>::kColumnsOfLane],
                                              const T* const (&rows)[kRowsOfLane], const float* columns) {
#pragma unroll 2
  for (int d = 0; d < D; d += 4) {
    float4 a[kRowsOfLane];
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) a[i] = load4(rows[i] + d);
#pragma unroll
    for (int j = 0; j < MaskTile<D>::kColumnsOfLane; ++j) {
      const float4 b =
          *reinterpret_cast<const float4*>(columns + (kLanesOfGroup * j + column_of_lane()) * MaskTile<D>::kStride + d);
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i) {
        sums[i][j] = fmaf(a[i].x, b.x, sums[i][j]);
        sums[i][j] = fmaf(a[i].y, b.y, sums[i][j]);
        sums[i][j] = fmaf(a[i].z, b.z, sums[i][j]);
        sums[i][j] = fmaf(a[i].w, b.w, sums[i][j]);
      }
    }
  }
}

template <int D>
using RowSums = float4[kRowsOfLane][MaskTile<D>::kVectors];

template <int D>
__device__ __forceinline__ void clear(RowSums<D>& sums) {
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i)
#pragma unroll
    for (int v = 0; v < MaskTile<D>::kVectors; ++v) sums[i][v] = make_float4(0.f, 0.f, 0.f, 0.f);
}

/// sums += weights columns. By a whole warp.
template <int D>
__device__ __forceinline__ void multiply_columns(RowSums<D>& sums,
                                                 const float (&weights)[kRowsOfLane][MaskTile<D>::kColumnsOfLane],
                                                 const float* columns) {
  using Tile = MaskTile<D>;
#pragma unroll
  for (int j = 0; j < Tile::kColumnsOfLane; ++j)
#pragma unroll 2
    for (int owner = 0; owner < kLanesOfGroup; ++owner) {
      float weight[kRowsOfLane];
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i)
        weight[i] = __shfl_sync(kAllLanes, weights[i][j], kLanesOfGroup * group_of_lane() + owner);
#pragma unroll
      for (int v = 0; v < Tile::kVectors; ++v) {
        // Lanes past the last channel repeat it and do not store.
        const int d = min(32 * v + 4 * column_of_lane(), D - 4);
        const float4 x = *reinterpret_cast<const float4*>(columns + (kLanesOfGroup * j + owner) * Tile::kStride + d);
#pragma unroll
        for (int i = 0; i < kRowsOfLane; ++i) {
          float4& o = sums[i][v];
          o = make_float4(fmaf(weight[i], x.x, o.x), fmaf(weight[i], x.y, o.y), fmaf(weight[i], x.z, o.z),
                          fmaf(weight[i], x.w, o.w));
        }
      }
    }
}

/// A lane's part of a row: finish(float4, channel) of every group of 4 channels that the head has.
template <int D, class T, class F>
__device__ __forceinline__ void store_head(T* to, const float4 (&sums)[MaskTile<D>::kVectors], const F& finish) {
#pragma unroll
  for (int v = 0; v < MaskTile<D>::kVectors; ++v) {
    const int d = 32 * v + 4 * column_of_lane();
    if (d >= D) continue;
    const float4 o = finish(sums[v], d);
    const float value[4] = {o.x, o.y, o.z, o.w};
    store_floats<T, 4>(to + d, value);
  }
}

/// Sum over the 8 lanes of a group in one fixed order, in each of them. By a whole warp.
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int step = 1; step < kLanesOfGroup; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

/// log2 of a key's size, and its mask; a key past the last has none of either.
__device__ __forceinline__ float key_bias(const float* sizes, int key, int tokens) {
  return key >= tokens ? -INFINITY : sizes ? log2f(sizes[key]) : 0.f;
}
__device__ __forceinline__ float key_mask(const float* mask, int key, int tokens) {
  return key < tokens ? mask[key] : 0.f;
}

/// How a head's tiles are shared among blocks.
struct MaskedGrid {
  int splits = 1, warps = kLeastWarps;
  unsigned blocks = 0;
};

inline MaskedGrid masked_grid(const char* who, int batch, int heads, int tokens) {
  MaskedGrid grid;
  const int tiles = (tokens + kTileRows - 1) / kTileRows;
  grid.splits = (tiles + kMostWarps - 1) / kMostWarps;
  grid.warps = std::max(kLeastWarps, (tiles + grid.splits - 1) / grid.splits);
  const int64_t blocks = int64_t(batch) * heads * grid.splits;
  if (blocks > INT32_MAX)
    fail(ExitCode::usage, who, ": ", batch, " images of ", heads, " heads are more than one launch takes");
  grid.blocks = unsigned(blocks);
  return grid;
}

/// Which tile of which head a block and its warps have.
struct MaskedPlace {
  __device__ __forceinline__ MaskedPlace(int splits, int heads, int tokens) {
    const int split = int(blockIdx.x) % splits, pair = int(blockIdx.x) / splits;
    head = pair % heads;
    image = pair / heads;
    leads = split == 0;
    first = (split * int(blockDim.x / kWarp) + int(threadIdx.x) / kWarp) * kTileRows;
    active = first < tokens;
    rows = (int64_t(image) * heads + head) * tokens;
  }
  int head, image;
  int first;     ///< row of the warp's tile
  bool active;   ///< it has one; the same in the whole warp. Others help to load
  bool leads;    ///< the head's first block
  int64_t rows;  ///< of this head in [B,H,N]
};

inline void check_masked(const char* who, int batch, int tokens, int heads, int head_dim, DType dtype) {
  check_dtype(who, dtype);
  if (head_dim < 16 || head_dim > 128 || head_dim % 16 != 0)
    fail(ExitCode::usage, who, ": heads of ", head_dim, " channels, expected a multiple of 16 from 16 to 128");
  if (tokens < 1 || tokens > kMostMaskedTokens)
    fail(ExitCode::usage, who, ": ", tokens, " tokens, expected 1 to ", kMostMaskedTokens);
  if (batch < 0 || heads < 1 || heads > 1024)
    fail(ExitCode::usage, who, ": ", batch, " images of ", heads, " heads, expected 1 to 1024 heads");
}

/// Calls f(Int<D>) for the head's channels, which have been checked.
template <int D>
struct HeadDim {
  static constexpr int kDim = D;
};
template <class F>
void with_head_dim(int head_dim, const F& f) {
  switch (head_dim) {
    case 16:
      return f(HeadDim<16>{});
    case 32:
      return f(HeadDim<32>{});
    case 48:
      return f(HeadDim<48>{});
    case 64:
      return f(HeadDim<64>{});
    case 80:
      return f(HeadDim<80>{});
    case 96:
      return f(HeadDim<96>{});
    case 112:
      return f(HeadDim<112>{});
    default:
      return f(HeadDim<128>{});
  }
}

}  // namespace
}  // namespace pyra::kernels::cuda
