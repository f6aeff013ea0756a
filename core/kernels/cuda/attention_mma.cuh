// A warp's share of attention on tensor cores, bf16 and fp16: 16 R query rows, softmax on line over chunks of keys.
// Rows g and g+8 of every 16 belong to the four lanes of quad g; nothing leaves the warp.
#pragma once
#include "kernels/cuda/attention_ptx.cuh"

namespace pyra::kernels::cuda {
namespace {

/// Below every logit, and finite: a row that has seen only -inf keeps weights of 0, not of NaN.
constexpr float kLowest = -1e30f;
/// A row's maximum is followed only when it has grown by more than this (in powers of two): weights stay below 2^8,
/// which fp16 holds as precisely as 1, and sums are rescaled about once instead of at every chunk. The choice is each
/// row's own, so a result does not depend on the rows beside it.
constexpr float kSlack = 8.f;

__device__ __forceinline__ uint32_t pack_pair(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack_pair(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

/// word[i] of lane t of a quad becomes word[t] of lane i: between 16 bytes of one lane and the mma's layout, in which
/// each lane of a quad holds 4 of them.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? word[i] : word[i + step], step);
      word[i] = upper ? other : word[i];
      word[i + step] = upper ? word[i + step] : other;
    }
  }
}

template <class T, int D, int R, int P = (D <= 64 ? 4 : 2)>
class MmaTile {
 public:
  using Element = T;
  static constexpr int kDim = D, kRows = 16 * R;
  static constexpr int kPairs = P;  ///< 16-key steps of a whole chunk
  static constexpr int kStride =
      D + 8;  ///< of rows in shared memory: an odd number of 16 bytes, so ldmatrix hits all banks
  /// Two blocks or more on a multiprocessor, so that one copies while another multiplies: 64K registers allow it.
  static constexpr int kMaxThreads = D * R <= 80 ? 256 : 128, kMinBlocks = 2;
  static constexpr int kWarpsWanted = D <= 64 ? 5 : 8;  ///< if they take several tiles in turn; 5 lost for 80 channels

  /// `query` is row 0 of the head; rows past the last repeat it and are not stored.
  __device__ __forceinline__ void start(const T* query, int first, int tokens, int pitch) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_row(query + size_t(min(first + 16 * r + 8 * half + quad(), tokens - 1)) * pitch, r, half);
        top_[r][half] = kLowest;
        sum_[r][half] = 0.f;
      }
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) out_[r][i][j] = 0.f;
    }
  }

  /// 16 Pairs keys more. `bias` is added to their logits, in powers of two; `logits`, if any, takes those of row 0.
  template <int Pairs>
  __device__ __forceinline__ void add(const T* keys, const T* values, const float* bias, float scale, float* logits) {
    float s[R][2 * Pairs][4] = {};
    multiply_keys<Pairs>(s, keys);
#pragma unroll
    for (int j = 0; j < 2 * Pairs; ++j) {
      const float2 b = *reinterpret_cast<const float2*>(bias + 8 * j + 2 * lane_in_quad());
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[r][j][i] = fmaf(s[r][j][i], scale, i % 2 == 0 ? b.x : b.y);
    }
    if (logits != nullptr && quad() == 0) {
#pragma unroll
      for (int j = 0; j < 2 * Pairs; ++j)
        *reinterpret_cast<float2*>(logits + 8 * j + 2 * lane_in_quad()) = make_float2(s[0][j][0], s[0][j][1]);
    }
    raise_tops<Pairs>(s);
    multiply_values<Pairs>(s, values);
  }

  /// Divides, stores the rows that exist and, where `logits` were kept, row 0's probabilities; `log_sum`, if any, takes
  /// the logarithms of the head's sums.
  __device__ __forceinline__ void finish(T* out, int first, int tokens, int pitch, const float* logits,
                                         float* class_row, float* log_sum) {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sum_[r][half];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        sum_[r][half] = 1.f / sum;
      }
    if (logits != nullptr) {
      __syncwarp();
      const float top = __shfl_sync(kAllLanes, top_[0][0], 0), inverse = __shfl_sync(kAllLanes, sum_[0][0], 0);
      for (int key = lane(); key < tokens; key += kWarp) class_row[key] = exp2_fast(logits[key] - top) * inverse;
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + 16 * r + 8 * half + quad();
        store_row(out + size_t(row) * pitch, r, half, row < tokens);
      }
    if (log_sum == nullptr || lane_in_quad() != 0) return;  // last, when registers are free
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + 16 * r + 8 * half + quad();
        if (row < tokens) log_sum[row] = top_[r][half] - log2f(sum_[r][half]);
      }
  }

 private:
  static __device__ __forceinline__ int lane() {
    return threadIdx.x % kWarp;
  }
  static __device__ __forceinline__ int quad() {
    return lane() / 4;
  }
  static __device__ __forceinline__ int lane_in_quad() {
    return lane() % 4;
  }

  __device__ __forceinline__ void load_row(const T* from, int r, int half) {
#pragma unroll
    for (int block = 0; block < D / 32; ++block) {
      const uint4 load = *reinterpret_cast<const uint4*>(from + 32 * block + 8 * lane_in_quad());
      uint32_t word[4] = {load.x, load.y, load.z, load.w};
      transpose_quad(word);
#pragma unroll
      for (int i = 0; i < 4; ++i) query_[r][2 * block + i / 2][half + 2 * (i % 2)] = word[i];
    }
    if constexpr (D % 32 != 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        query_[r][D / 16 - 1][half + 2 * i] =
            *reinterpret_cast<const uint32_t*>(from + D - 16 + 8 * i + 2 * lane_in_quad());
    }
  }

  __device__ __forceinline__ void store_row(T* to, int r, int half, bool exists) {
    const float inverse = sum_[r][half];
    const auto word_of = [&](int tile) {
      return pack_pair(T{}, out_[r][tile][2 * half] * inverse, out_[r][tile][2 * half + 1] * inverse);
    };
#pragma unroll
    for (int block = 0; block < D / 32; ++block) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = word_of(4 * block + i);
      transpose_quad(word);
      if (exists)
        *reinterpret_cast<uint4*>(to + 32 * block + 8 * lane_in_quad()) =
            make_uint4(word[0], word[1], word[2], word[3]);
    }
    if constexpr (D % 32 != 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (exists) *reinterpret_cast<uint32_t*>(to + D - 16 + 8 * i + 2 * lane_in_quad()) = word_of(D / 8 - 2 + i);
    }
  }

  /// s = q kᵀ: a key's row is a column of the mma's right operand as it lies in memory.
  template <int Pairs>
  __device__ __forceinline__ void multiply_keys(float (&s)[R][2 * Pairs][4], const T* keys) {
    // Matrices in the order keys 0-7 (d 0-7, then 8-15), keys 8-15 (the same).
    const auto base =
        uint32_t(__cvta_generic_to_shared(keys + (lane() / 16 * 8 + lane() % 8) * kStride + lane() / 8 % 2 * 8));
#pragma unroll
    for (int d = 0; d < D / 16; ++d)
#pragma unroll
      for (int pair = 0; pair < Pairs; ++pair) {
        uint32_t b[4];
        load_matrices(b, base + (pair * 16 * kStride + d * 16) * int(sizeof(T)));
#pragma unroll
        for (int r = 0; r < R; ++r) {
          multiply_add<T>(s[r][2 * pair], query_[r][d], b[0], b[1]);
          multiply_add<T>(s[r][2 * pair + 1], query_[r][d], b[2], b[3]);
        }
      }
  }

  template <int Pairs>
  __device__ __forceinline__ void raise_tops(const float (&s)[R][2 * Pairs][4]) {
    float factor[R][2];
    bool raised = false;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float high = fmaxf(s[r][0][2 * half], s[r][0][2 * half + 1]);
#pragma unroll
        for (int j = 1; j < 2 * Pairs; ++j) high = fmaxf(high, fmaxf(s[r][j][2 * half], s[r][j][2 * half + 1]));
        high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, 1));
        high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, 2));
        float& top = top_[r][half];
        const bool raise = high > top + kSlack;
        factor[r][half] = raise ? exp2_fast(top - high) : 1.f;
        top = raise ? high : top;
        raised |= raise;
      }
    if (!__any_sync(kAllLanes, raised)) return;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) sum_[r][half] *= factor[r][half];
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) out_[r][i][j] *= factor[r][j / 2];
    }
  }

  /// out += 2^(s - top) v: the mma's result s is its left operand register by register; the sum is of unrounded
  /// weights.
  template <int Pairs>
  __device__ __forceinline__ void multiply_values(float (&s)[R][2 * Pairs][4], const T* values) {
    // Matrices in the order d 0-7 (keys 0-7, then 8-15), d 8-15 (the same), transposed on the way.
    const auto base =
        uint32_t(__cvta_generic_to_shared(values + (lane() / 8 % 2 * 8 + lane() % 8) * kStride + lane() / 16 * 8));
#pragma unroll
    for (int pair = 0; pair < Pairs; ++pair) {
      uint32_t weight[R][4];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i % 2;
          const float* logit = s[r][2 * pair + i / 2] + 2 * half;
          const float low = exp2_fast(logit[0] - top_[r][half]), high = exp2_fast(logit[1] - top_[r][half]);
          sum_[r][half] += low;
          sum_[r][half] += high;
          weight[r][i] = pack_pair(T{}, low, high);
        }
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t b[4];
        load_transposed(b, base + (pair * 16 * kStride + d * 16) * int(sizeof(T)));
#pragma unroll
        for (int r = 0; r < R; ++r) {
          multiply_add<T>(out_[r][2 * d], weight[r], b[0], b[1]);
          multiply_add<T>(out_[r][2 * d + 1], weight[r], b[2], b[3]);
        }
      }
    }
  }

  uint32_t query_[R][D / 16][4];
  float out_[R][D / 8][4];
  float top_[R][2];  ///< a row's maximum, or at most kSlack less
  float sum_[R][2];  ///< this lane's part of a row's sum; its inverse, complete, from finish() on
};

}  // namespace
}  // namespace pyra::kernels::cuda
