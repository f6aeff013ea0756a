// y = GELU(x) and d *= GELU'(x), element by element: a thread owns 8 neighbours. Moves x and y, or x and d twice.
#include "kernels/cuda/gelu_train.h"

#include "base/error.h"
#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kThreads = 256, kVector = 8;
constexpr float kRootHalf = 0.70710678118654752f;        // 1 / sqrt(2)
constexpr float kInverseRootTau = 0.39894228040143268f;  // 1 / sqrt(2 pi)
constexpr float kRootTwoByPi = 0.79788456080286536f;     // sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

template <bool kTanh>
__device__ __forceinline__ float gelu(float x) {
  if constexpr (kTanh) return 0.5f * x * (1.0f + tanhf(kRootTwoByPi * (x + kCubic * x * x * x)));
  return 0.5f * x * (1.0f + erff(x * kRootHalf));
}

template <bool kTanh>
__device__ __forceinline__ float slope(float x) {
  if constexpr (kTanh) {
    const float t = tanhf(kRootTwoByPi * (x + kCubic * x * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * kRootTwoByPi * (1.0f + 3.0f * kCubic * x * x);
  }
  return 0.5f * (1.0f + erff(x * kRootHalf)) + x * kInverseRootTau * expf(-0.5f * x * x);
}

template <class T, bool kTanh, bool kBackward>
__global__ void __launch_bounds__(kThreads) gelu_kernel(const T* x, T* y, int64_t vectors) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= vectors) return;
  const auto from = Words<T, kVector>::read(x + i * kVector);
  float values[kVector];
  if constexpr (kBackward) {
    const auto given = Words<T, kVector>::read(y + i * kVector);
#pragma unroll
    for (int e = 0; e < kVector; ++e) values[e] = given.value(e) * slope<kTanh>(from.value(e));
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) values[e] = gelu<kTanh>(from.value(e));
  }
  Words<T, kVector>::of(values, 0).write(y + i * kVector);
}

template <bool kBackward>
void launch(const char* who, const void* x, void* y, DType dtype, int64_t count, bool tanh, cudaStream_t stream) {
  check_dtype(who, dtype);
  if (count < 0 || count % kVector != 0)
    fail(ExitCode::usage, who, ": ", count, " values; expected a multiple of ", kVector);
  if (count == 0) return;
  check_pointer(who, "x", x);
  check_pointer(who, kBackward ? "d" : "y", y);
  const int64_t vectors = count / kVector;
  const auto blocks = unsigned((vectors + kThreads - 1) / kThreads);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
    if (tanh)
      gelu_kernel<T, true, kBackward><<<blocks, kThreads, 0, stream>>>(from, to, vectors);
    else
      gelu_kernel<T, false, kBackward><<<blocks, kThreads, 0, stream>>>(from, to, vectors);
  });
  PYRA_CUDA_LAUNCHED();
}

}  // namespace

void gelu_forward(const void* x, void* y, DType dtype, int64_t count, bool tanh, cudaStream_t stream) {
  launch<false>("gelu_forward", x, y, dtype, count, tanh, stream);
}

void gelu_backward(const void* x, void* d, DType dtype, int64_t count, bool tanh, cudaStream_t stream) {
  launch<true>("gelu_backward", x, d, dtype, count, tanh, stream);
}

}  // namespace pyra::kernels::cuda
