// Products of LoRA's thin matrices on tensor cores: 16 by 8 results, 16 terms at a time.
//
// Values of 16 bits are multiplied as they are. fp32 masters beside them are split into two values of 16 bits, and fp32
// activations and what they meet into two of tf32: nothing is lost but products of two low parts (2^-22 and less).
#pragma once
#include "kernels/cuda/attention_ptx.cuh"
#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

/// x as the sum of two values of tf32, but for its last bits.
__device__ __forceinline__ void split_tf32(uint32_t x, uint32_t& high, uint32_t& low) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(__uint_as_float(x)));
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(low) : "f"(__fsub_rn(__uint_as_float(x), __uint_as_float(high))));
}

__device__ __forceinline__ void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// c [16,8] += a [16,16] b [16,8]. With g = lane/4, t = lane%4, a lane brings four terms: of a's rows g (`lower`) and
/// g+8
/// (`upper`), and of b's column g. Which four terms are lane t's is the caller's choice, the same for a and b. c:
/// columns 2t and 2t+1 of row g, then of row g+8.
template <class T>
__device__ __forceinline__ void multiply_add_16(float (&c)[4], const Words<T, 4>& lower, const Words<T, 4>& upper,
                                                const Words<T, 4>& b) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t a[4] = {lower.word[0], upper.word[0], lower.word[1], upper.word[1]};
    multiply_add<T>(c, a, b.word[0], b.word[1]);
  } else {
#pragma unroll
    for (int s = 0; s < 4; s += 2) {
      uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        split_tf32(lower.word[s + i], a_high[2 * i], a_low[2 * i]);
        split_tf32(upper.word[s + i], a_high[2 * i + 1], a_low[2 * i + 1]);
        split_tf32(b.word[s + i], b_high[i], b_low[i]);
      }
      multiply_add_tf32(c, a_low, b_high);
      multiply_add_tf32(c, a_high, b_low);
      multiply_add_tf32(c, a_high, b_high);
    }
  }
}

/// Four fp32 values as T and what T leaves of them; of fp32 nothing.
template <class T>
struct Parts {
  Words<T, 4> high, low;
  template <int kValues>
  __device__ __forceinline__ static Parts of(const float (&values)[kValues], int first) {
    Parts parts;
    parts.high = Words<T, 4>::of(values, first);
    if constexpr (sizeof(T) == 2) {
      float rest[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) rest[e] = __fsub_rn(values[first + e], parts.high.value(e));
      parts.low = Words<T, 4>::of(rest, 0);
    }
    return parts;
  }
};

/// The transpose of an 8x8 matrix of 2-byte elements, of which lane l holds elements 2(l%4) and 2(l%4)+1 of row l/4.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

}  // namespace
}  // namespace pyra::kernels::cuda
