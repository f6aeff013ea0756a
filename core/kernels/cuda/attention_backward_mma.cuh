// A warp's share of attention's gradient on tensor cores, bf16 and fp16: 16 rows (attention_backward_terms.cuh) over
// chunks of columns. Rows g and g+8 belong to the four lanes of quad g; nothing leaves the warp.
#pragma once
#include "kernels/cuda/attention_backward_terms.cuh"
#include "kernels/cuda/attention_mma.cuh"

namespace pyra::kernels::cuda {
namespace {

template <class T, int D, bool kKeys_>
class MmaBackward {
 public:
  using Element = T;
  static constexpr bool kKeys = kKeys_;
  static constexpr int kDim = D, kRows = 16;
  static constexpr int kPairs = D <= 64 ? 2 : 1;  ///< 16-column steps of a whole chunk
  static constexpr int kStride = D + 8;  ///< in shared memory: an odd number of 16 bytes, so ldmatrix hits all banks
  static constexpr int kMinBlocks = D <= 64 ? 3 : 2;

  /// The tile's rows of `x` (K, or Q) and of `z` (V, or dO); rows past the last repeat it and are not stored.
  __device__ __forceinline__ void start(const Operand<T>& x, const Operand<T>& z, const RowTerms<kKeys>& terms,
                                        int first, int tokens) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 8 * half + quad(), readable = min(row, tokens - 1);
      load_row(x_, x.row(readable), half);
      load_row(z_, z.row(readable), half);
      shift_[half] = terms.shift(row);
      delta_[half] = terms.delta_of(row);
    }
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x_grad_[i][j] = 0.f;
        if (kKeys) z_grad_[i][j] = 0.f;
      }
  }

  /// 16 Pairs columns more: of Q and dO, or of K and V; their terms and, of queries, rowsum(dO ∘ out).
  template <int Pairs>
  __device__ __forceinline__ void add(const T* x_columns, const T* z_columns, const float* shift, const float* delta,
                                      float scale) {
    float p[2 * Pairs][4] = {}, ds[2 * Pairs][4] = {};
    multiply_rows<Pairs>(p, x_, x_columns);
    multiply_rows<Pairs>(ds, z_, z_columns);
#pragma unroll
    for (int j = 0; j < 2 * Pairs; ++j) {
      const int column = 8 * j + 2 * lane_in_quad();
      const float2 c = *reinterpret_cast<const float2*>(shift + column);
      float2 d = {};
      if (kKeys) d = *reinterpret_cast<const float2*>(delta + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[j][i] = exp2_fast(fmaf(p[j][i], scale, (i % 2 == 0 ? c.x : c.y) + shift_[i / 2]));
        ds[j][i] = p[j][i] * (ds[j][i] - (!kKeys ? delta_[i / 2] : i % 2 == 0 ? d.x : d.y));
      }
    }
    multiply_columns<Pairs>(x_grad_, ds, x_columns);
    if constexpr (kKeys) multiply_columns<Pairs>(z_grad_, p, z_columns);
  }

  /// Stores the rows that exist: the gradient of x, times `factor`, and of z if rows are keys.
  __device__ __forceinline__ void finish(T* x_grad, T* z_grad, int first, int tokens, int pitch, float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 8 * half + quad();
      store_row(x_grad + size_t(row) * pitch, x_grad_, half, factor, row < tokens);
      if constexpr (kKeys) store_row(z_grad + size_t(row) * pitch, z_grad_, half, 1.f, row < tokens);
    }
  }

 private:
  using Rows = uint32_t[D / 16][4];
  using Sums = float[D / 8][4];

  static __device__ __forceinline__ int lane() {
    return threadIdx.x % kWarp;
  }
  static __device__ __forceinline__ int quad() {
    return lane() / 4;
  }
  static __device__ __forceinline__ int lane_in_quad() {
    return lane() % 4;
  }

  static __device__ __forceinline__ void load_row(Rows& rows, const T* from, int half) {
#pragma unroll
    for (int block = 0; block < D / 32; ++block) {
      const uint4 load = *reinterpret_cast<const uint4*>(from + 32 * block + 8 * lane_in_quad());
      uint32_t word[4] = {load.x, load.y, load.z, load.w};
      transpose_quad(word);
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[2 * block + i / 2][half + 2 * (i % 2)] = word[i];
    }
    if constexpr (D % 32 != 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        rows[D / 16 - 1][half + 2 * i] = *reinterpret_cast<const uint32_t*>(from + D - 16 + 8 * i + 2 * lane_in_quad());
    }
  }

  static __device__ __forceinline__ void store_row(T* to, const Sums& sums, int half, float factor, bool exists) {
    const auto word_of = [&](int tile) {
      return pack_pair(T{}, sums[tile][2 * half] * factor, sums[tile][2 * half + 1] * factor);
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

  /// s += rows columnsᵀ: a column's channels are a column of the mma's right operand as they lie in memory.
  template <int Pairs>
  static __device__ __forceinline__ void multiply_rows(float (&s)[2 * Pairs][4], const Rows& rows, const T* columns) {
    // Matrices in the order columns 0-7 (d 0-7, then 8-15), columns 8-15 (the same).
    const auto base =
        uint32_t(__cvta_generic_to_shared(columns + (lane() / 16 * 8 + lane() % 8) * kStride + lane() / 8 % 2 * 8));
#pragma unroll
    for (int d = 0; d < D / 16; ++d)
#pragma unroll
      for (int pair = 0; pair < Pairs; ++pair) {
        uint32_t b[4];
        load_matrices(b, base + (pair * 16 * kStride + d * 16) * int(sizeof(T)));
        multiply_add<T>(s[2 * pair], rows[d], b[0], b[1]);
        multiply_add<T>(s[2 * pair + 1], rows[d], b[2], b[3]);
      }
  }

  /// sums += weights columns: the mma's result is its left operand register by register.
  template <int Pairs>
  static __device__ __forceinline__ void multiply_columns(Sums& sums, const float (&weights)[2 * Pairs][4],
                                                          const T* columns) {
    // Matrices in the order d 0-7 (columns 0-7, then 8-15), d 8-15 (the same), transposed on the way.
    const auto base =
        uint32_t(__cvta_generic_to_shared(columns + (lane() / 8 % 2 * 8 + lane() % 8) * kStride + lane() / 16 * 8));
#pragma unroll
    for (int pair = 0; pair < Pairs; ++pair) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* two = weights[2 * pair + i / 2] + i % 2 * 2;
        a[i] = pack_pair(T{}, two[0], two[1]);
      }
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t b[4];
        load_transposed(b, base + (pair * 16 * kStride + d * 16) * int(sizeof(T)));
        multiply_add<T>(sums[2 * d], a, b[0], b[1]);
        multiply_add<T>(sums[2 * d + 1], a, b[2], b[3]);
      }
    }
  }

  Rows x_, z_;
  Sums x_grad_, z_grad_;
  float shift_[2], delta_[2];
};

}  // namespace
}  // namespace pyra::kernels::cuda
