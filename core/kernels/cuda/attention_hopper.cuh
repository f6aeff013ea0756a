// What Hopper's ways of attention share, forward and back: the store of a row out of the registers of a warpgroup's
// product.
#pragma once
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kHeadDim = 64, kTile = 64, kRowBytes = 2 * kHeadDim;

/// Row `half` of the thread's two, its lanes 16 bytes each.
template <class T>
__device__ __forceinline__ void store_half(T* to, const float (&out)[kHeadDim / 2], int half, float inverse,
                                           bool exists) {
#pragma unroll
  for (int block = 0; block < kHeadDim / 32; ++block) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = out + 4 * (4 * block + i) + 2 * half;
      word[i] = pack_pair(T{}, pair[0] * inverse, pair[1] * inverse);
    }
    transpose_quad(word);
    if (exists)
      *reinterpret_cast<uint4*>(to + 32 * block + 8 * (threadIdx.x % 4)) =
          make_uint4(word[0], word[1], word[2], word[3]);
  }
}

}  // namespace
}  // namespace pyra::kernels::cuda
