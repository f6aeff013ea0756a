// The parts of LoRA's gradients (lora.cu): what a warp makes of 16 rows and 64 channels.
#pragma once
#include "kernels/cuda/lora_mma.cuh"
#include "kernels/cuda/philox.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kVector = 8;

/// What the gradients have in common: partial[c * channel_step + j * rank_step] = scale * sum of m[i][c] h[i][j].
template <class T>
struct Job {
  const T* m;
  int64_t m_stride;
  const float *norm_weight, *norm_bias;
  const T* h;
  int64_t h_stride;
  float scale;
  float* partial;
  int64_t chunk_stride, channel_step, rank_step;
  int rows, channels, ranks, rows_of_chunk;
  const float* a;  ///< of these ranks
  T* d_x;
  int64_t d_x_stride;
  Dropout dropout;
};

/// A warp's 16 rows and 64 channels. With g = lane/4, t = lane%4, a lane owns rows 4t..4t+3 and channels 8g..8g+7 of
/// them; of h it reads ranks 4t..4t+3 of every 16 for the rows below; of the sums of d_A it holds ranks 4(g/2) + g%2
/// and 2 more, channels 16t + j and 16t + 8 + j of every tile j of 8.
constexpr int kTileChannels = 64;
__device__ __forceinline__ int thin_row(int g, int pair) {
  return g / 2 * 4 + pair * 2 + g % 2;
}

/// What d_x takes of A, in the order of lanes: of every 16 ranks and every pair of a lane's channels two vectors (high
/// and low parts; of fp32 the two channels).
template <class T, int kGroups>
struct Factors {
  uint4 vector[kGroups][4][2][kWarp];

  __device__ __forceinline__ void fill(const Job<T>& job, int slab, int warp, int lane) {
    const int c = slab + lane / 4 * kVector + warp * 2, t = lane % 4;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float lower[4] = {}, upper[4] = {};
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int rank = group * 16 + t * 4 + q;
        if (rank >= job.ranks || c >= job.channels) continue;
        const float2 both = *reinterpret_cast<const float2*>(job.a + int64_t(rank) * job.channels + c);
        lower[q] = both.x;
        upper[q] = both.y;
      }
      const auto l = Parts<T>::of(lower, 0), u = Parts<T>::of(upper, 0);
      if constexpr (sizeof(T) == 2) {
        vector[group][warp][0][lane] = make_uint4(l.high.word[0], l.high.word[1], u.high.word[0], u.high.word[1]);
        vector[group][warp][1][lane] = make_uint4(l.low.word[0], l.low.word[1], u.low.word[0], u.low.word[1]);
      } else {
        vector[group][warp][0][lane] = make_uint4(l.high.word[0], l.high.word[1], l.high.word[2], l.high.word[3]);
        vector[group][warp][1][lane] = make_uint4(u.high.word[0], u.high.word[1], u.high.word[2], u.high.word[3]);
      }
    }
  }
  /// c += A of channels 2 `pair` and 2 `pair`+1, times h.
  __device__ __forceinline__ void multiply(float (&c)[4], int group, int pair, const Words<T, 4>& h, int lane) const {
    const uint4 first = vector[group][pair][0][lane], second = vector[group][pair][1][lane];
    if constexpr (sizeof(T) == 2) {
      multiply_add_16<T>(c, {first.x, first.y}, {first.z, first.w}, h);
      multiply_add_16<T>(c, {second.x, second.y}, {second.z, second.w}, h);
    } else {
      multiply_add_16<T>(c, {first.x, first.y, first.z, first.w}, {second.x, second.y, second.z, second.w}, h);
    }
  }
};
template <class T>
struct Factors<T, 0> {};

/// Element j of four rows.
template <class T>
__device__ __forceinline__ Words<T, 4> column_of(const Words<T, kVector> (&m)[4], int j) {
  Words<T, 4> column;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t a = m[2 * i].word[j / 2], b = m[2 * i + 1].word[j / 2];
      column.word[i] = j % 2 == 0 ? permute<0x5410>(a, b) : permute<0x7632>(a, b);
    }
  } else {
#pragma unroll
    for (int q = 0; q < 4; ++q) column.word[q] = m[q].word[j];
  }
  return column;
}

/// Ranks of `group` for d_A: of the rows that a lane owns, its two ranks.
template <class T>
__device__ __forceinline__ void turn(const Job<T>& job, const Words<T, 4> (&h)[2], int group, int base, int end,
                                     int lane, Words<T, 4>& lower, Words<T, 4>& upper) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lower.word[i] = transpose_matrix(h[i].word[0]);
      upper.word[i] = transpose_matrix(h[i].word[1]);
    }
  } else {
    const int rank = group * 16 + lane / 8 * 4 + lane / 4 % 2;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int row = base + lane % 4 * 4 + q;
      const T* from = job.h + row * job.h_stride + rank;
      lower.word[q] = row < end && rank < job.ranks ? __float_as_uint(from[0]) : 0;
      upper.word[q] = row < end && rank + 2 < job.ranks ? __float_as_uint(from[2]) : 0;
    }
  }
}

}  // namespace
}  // namespace pyra::kernels::cuda
