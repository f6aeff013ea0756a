// Device code that several kernels share: conversions, 16-byte accesses, warp sums. Internal linkage throughout.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

/// N neighbouring elements as one access of up to 16 bytes; addresses must be aligned to the access.
template <class T, int N>
struct alignas(sizeof(T) * N <= 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

template <class T, int N>
__device__ __forceinline__ void load_floats(const T* from, float (&to)[N]) {
  const auto pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(pack.value[i]);
}

template <class T, int N>
__device__ __forceinline__ void store_floats(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.value[i] = from_float<T>(from[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

/// Sum over the warp in one fixed order, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

/// An image's class_rows [heads,tokens]: the mean over heads of what the class token pays to `token`.
[[maybe_unused]] __device__ __forceinline__ float attention_mean(const float* class_rows, int heads, int tokens,
                                                                 int token) {
  float sum = 0;
  for (int head = 0; head < heads; ++head) sum += class_rows[int64_t(head) * tokens + token];
  return __fdiv_rn(sum, float(heads));
}

/// ask(device)'s answer for the current device, asked once: `known` keeps those of a question by device, 0 where it was
/// not asked yet, and so must not be an answer. Asked anew for devices beyond the 64th.
template <class F>
int asked_once(std::atomic<int> (&known)[64], const F& ask) {
  int device = 0;
  PYRA_CUDA(cudaGetDevice(&device));
  if (device >= 64) return ask(device);
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) known[device].store(answer = ask(device), std::memory_order_relaxed);
  return answer;
}

/// Bytes of dynamic shared memory that need no leave: 48 KB without what kernels declare, a few words.
constexpr size_t kSharedAlways = 47 << 10;

/// Once for a kernel and a device: leave to use all the shared memory that a block may have beside what the kernel
/// declares. kPrefer: an SM gives it as much as it can, at L1's cost.
template <auto kKernel, bool kPrefer = false>
void allow_shared_memory() {
  static std::atomic<int> known[64];
  (void)asked_once(known, [](int device) {
    const auto kernel = reinterpret_cast<const void*>(kKernel);
    int most = 0;
    cudaFuncAttributes attributes{};
    PYRA_CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    PYRA_CUDA(cudaFuncGetAttributes(&attributes, kernel));
    PYRA_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   most - int(attributes.sharedSizeBytes)));
    if (kPrefer)
      PYRA_CUDA(
          cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    return 1;
  });
}

[[nodiscard]] inline int multiprocessors() {
  int device = 0, count = 0;
  PYRA_CUDA(cudaGetDevice(&device));
  PYRA_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

/// Calls f(T{}) with the C++ type of `dtype`.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::fp32:
      return f(float{});
    case DType::bf16:
      return f(__nv_bfloat16{});
    case DType::fp16:
      return f(__half{});
  }
}

}  // namespace
}  // namespace pyra::kernels::cuda
