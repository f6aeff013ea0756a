// What match.cu and rank.cu share: for each of some rows the column with the highest score, the lowest on ties.
//
// Scores and positions travel as one 64-bit integer that orders as both, so that partial results can be combined in
// any order without changing the outcome. A score that is not a number never enters (nor -infinity): kNoPartner.
#pragma once
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/device.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kSearchThreads = 256;

/// Unsigned integers in the order of the floats. -0 becomes +0: they tie.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(uint32_t order) {
  return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

/// Greater is a higher score, then a lower column.
__device__ __forceinline__ uint64_t partner_key(float score, int column) {
  return uint64_t(ordered(score)) << 32 | uint32_t(~column);
}
constexpr uint64_t kNoPartner = uint64_t(0x007fffffu) << 32 | 0xffffffffu;  // -infinity, column 0

__device__ __forceinline__ float score_of(uint64_t partner) {
  return from_ordered(uint32_t(partner >> 32));
}
__device__ __forceinline__ int column_of(uint64_t partner) {
  return int(~uint32_t(partner));
}

/// kernels/sort_key.h's: ascending keys are descending scores, then ascending positions; NaN counts as -infinity.
__device__ __forceinline__ uint64_t sort_key(float score, int position) {
  const uint32_t order = isnan(score) ? 0x007fffffu : ordered(score);
  return uint64_t(~order) << 32 | uint32_t(position);
}

/// How many of keys [0,count) are smaller: the rank of `key` among them, as all keys differ.
__device__ __forceinline__ int count_smaller(const uint64_t* keys, int count, uint64_t key) {
  int smaller = 0;
#pragma unroll 8
  for (int i = 0; i < count; ++i) smaller += keys[i] < key;
  return smaller;
}

/// 1/|x| from the squared norm, 0 for a zero vector: then its cosines are 0.
__device__ __forceinline__ float inverse_norm(float square) {
  return square > 0 ? __fdiv_rn(1.0f, __fsqrt_rn(square)) : 0.0f;
}

/// The elements of 16 bytes. Word by word: arrays of 16-bit elements would cost the compiler a register each.
__device__ __forceinline__ void unpack(uint4 raw, float (&to)[4], float) {
  to[0] = __uint_as_float(raw.x);
  to[1] = __uint_as_float(raw.y);
  to[2] = __uint_as_float(raw.z);
  to[3] = __uint_as_float(raw.w);
}

__device__ __forceinline__ float2 unpack_word(uint32_t word, __nv_bfloat16) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
__device__ __forceinline__ float2 unpack_word(uint32_t word, __half) {
  const __half2_raw pair{static_cast<unsigned short>(word), static_cast<unsigned short>(word >> 16)};
  return __half22float2(__half2(pair));
}

template <class T>
__device__ __forceinline__ void unpack(uint4 raw, float (&to)[8], T) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack_word(words[i], T{});
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}

template <int kCount>
__device__ __forceinline__ void store_chunk(float* to, const float (&from)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    *reinterpret_cast<float4*>(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
  }
}

template <class T>
constexpr int kChunk = 16 / int(sizeof(T));

/// sum[i][j] += row i . column j over `depth` (a multiple of 4) floats, in order of d, one FMA each. Rows lie in shared
/// memory an odd number of 16-byte units apart, so that the neighbouring columns of neighbouring lanes do not collide.
template <int kRows, int kColumns>
__device__ __forceinline__ void multiply(const float* rows, int row_step, const float* columns, int column_step,
                                         int depth, float (&sum)[kRows][kColumns]) {
  // Small tiles are few: reads ahead fill the wait that other warps do not.
#pragma unroll(kRows* kColumns <= 16 ? 4 : 1)
  for (int d = 0; d < depth; d += 4) {
    float4 row[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) row[i] = *reinterpret_cast<const float4*>(rows + i * row_step + d);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float4 column = *reinterpret_cast<const float4*>(columns + j * column_step + d);
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i][j] = fmaf(row[i].x, column.x, sum[i][j]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i][j] = fmaf(row[i].y, column.y, sum[i][j]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i][j] = fmaf(row[i].z, column.z, sum[i][j]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i][j] = fmaf(row[i].w, column.w, sum[i][j]);
    }
  }
}

/// Tiles of a product of `rows` by `columns`. Tile t's rows are t / across + i * down, its columns
/// t % across + j * across: neighbouring lanes read neighbouring rows of shared memory.
struct Tiling {
  int down, across;
  __device__ __forceinline__ int count() const { return down * across; }
};

template <int kRows, int kColumns>
__device__ __forceinline__ Tiling tiling(int rows, int columns) {
  return {(rows + kRows - 1) / kRows, (columns + kColumns - 1) / kColumns};
}

/// The best column of each row of one tile, into partial[i * slots + slot].
template <int kRows, int kColumns, class Scale>
__device__ __forceinline__ void store_best(const float (&sum)[kRows][kColumns], int column, int across, int columns,
                                           int first_column, const Scale& scale, uint64_t* partial, int slots,
                                           int slot) {
  float best[kRows];
  int chosen[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    best[i] = -INFINITY;
    chosen[i] = 0;
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int at = column + j * across;
    if (at >= columns) break;
    const float factor = scale(at);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float score = sum[i][j] * factor;
      if (score > best[i]) {
        best[i] = score;
        chosen[i] = first_column + at;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    partial[i * slots + slot] = best[i] == -INFINITY ? kNoPartner : partner_key(best[i], chosen[i]);
  }
}

/// The better of `best` and what tiles [first,last) found for `row`, by one of `lanes` that share them; tile t lies in
/// slot t - first.
__device__ __forceinline__ uint64_t better_partner(uint64_t best, const uint64_t* partial, int slots, Tiling tiles,
                                                   int row, int first, int last, int lane = 0, int lanes = 1) {
  const int i = row / tiles.down, own = row % tiles.down * tiles.across;
  const int from = max(own, first), to = min(own + tiles.across, last);
  for (int t = from + lane; t < to; t += lanes) best = max(best, partial[i * slots + t - first]);
  return best;
}

/// Bytes of consecutive arrays in dynamic shared memory.
struct SharedBytes {
  int next = 0;
  template <class T>
  int take(int count) {
    const int at = next;
    next = (next + count * int(sizeof(T)) + 15) / 16 * 16;
    return at;
  }
};

}  // namespace
}  // namespace pyra::kernels::cuda
