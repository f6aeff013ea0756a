// Dropout masks on the device: base/philox.h's numbers, kernels/dropout.cpp's use of them, bit for bit.
#pragma once
#include <cstdint>

#include "base/philox.h"
#include "kernels/cuda/lora.h"
#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

/// Block `counter` of the generator with this key and upper half of the counter.
__device__ __forceinline__ uint4 philox(uint2 key, uint2 high, uint64_t counter) {
  constexpr uint32_t kMultiply0 = 0xD2511F53, kMultiply1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  uint4 x = make_uint4(uint32_t(counter), uint32_t(counter >> 32), high.x, high.y);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(kMultiply0) * x.x, p1 = uint64_t(kMultiply1) * x.z;
    x = make_uint4(uint32_t(p1 >> 32) ^ x.y ^ key.x, uint32_t(p1), uint32_t(p0 >> 32) ^ x.w ^ key.y, uint32_t(p0));
    key.x += kWeyl0;
    key.y += kWeyl1;
  }
  return x;
}

/// PTX's byte permutation; bit 3 of a nibble of `selector` takes the byte's sign eight times, which CUDA's __byte_perm
/// does not promise.
template <uint32_t selector>
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "n"(selector));
  return out;
}

/// Which of eight elements are dropped, 16 bits each, all ones or all zeros, as elements of 16 bits stand in words.
struct Dropped {
  uint32_t pair[4];

  /// All 32 bits of element e.
  [[nodiscard]] __device__ __forceinline__ uint32_t word(int e) const {
    return e % 2 == 0 ? permute<0x1010>(pair[e / 2], 0) : permute<0x3232>(pair[e / 2], 0);
  }
  [[nodiscard]] __device__ __forceinline__ float apply(float x, int e) const {
    return __uint_as_float(__float_as_uint(x) & ~word(e));
  }
  template <class T>
  __device__ __forceinline__ void apply(Words<T, 8>& x) const {
#pragma unroll
    for (int w = 0; w < Words<T, 8>::kCount; ++w) x.word[w] &= ~(sizeof(T) == 4 ? word(w) : pair[w % 4]);
  }
};

/// A step's dropout at one site.
class DropoutMask {
 public:
  __device__ __forceinline__ explicit DropoutMask(const Dropout& dropout) : threshold_(dropout.threshold) {
    if (threshold_ == 0) return;
    scale_ = dropout.scale;
    const uint64_t domain = *dropout.step * dropout.sites_per_step + dropout.site;
    key_ = make_uint2(uint32_t(dropout.seed), uint32_t(dropout.seed >> 32));
    high_ = make_uint2(uint32_t(domain), uint32_t(domain >> 32) ^ (uint32_t(RandomStream::dropout) << 24));
  }
  /// Of what is kept: 1/(1-p).
  [[nodiscard]] __device__ __forceinline__ float scale() const { return scale_; }
  [[nodiscard]] __device__ __forceinline__ bool drops() const { return threshold_ != 0; }

  /// Of the eight elements from `first`, a multiple of 8, on.
  [[nodiscard]] __device__ __forceinline__ Dropped dropped(uint64_t first) const {
    const uint4 words = philox(key_, high_, first / 8);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    Dropped result;
    // A half below the threshold leaves a negative difference.
#pragma unroll
    for (int i = 0; i < 4; ++i)
      result.pair[i] = permute<0xffbb>((word[i] & 0xffffu) - threshold_, (word[i] >> 16) - threshold_);
    return result;
  }

 private:
  uint32_t threshold_;
  float scale_ = 1.0f;
  uint2 key_{}, high_{};
};

}  // namespace
}  // namespace pyra::kernels::cuda
