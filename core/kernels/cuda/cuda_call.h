// What the CUDA files share: element types, and errors of the runtime as our own.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace pyra::kernels::cuda {

/// Elements of a tensor in device memory.
enum class DType { fp32, bf16, fp16 };
[[nodiscard]] constexpr size_t size_of(DType dtype) {
  return dtype == DType::fp32 ? 4 : 2;
}

/// A count in device memory that the blocks of a kernel add to, and that a later one waits for instead of for all that
/// is in front of it in the stream (dependent.cuh). 0 where a pass begins.
struct Tally {
  int* count = nullptr;  ///< null: none
  int whole = 0;         ///< the count that is waited for
};

/// To the next multiple of `step`.
[[nodiscard]] constexpr int round_up(int value, int step) {
  return (value + step - 1) / step * step;
}

/// Throws Error(device) with the call's text, the error's name and its meaning. The sticky error is cleared first, so
/// that the next call reports its own.
void check_cuda(cudaError_t status, const char* call, const char* file, int line);

/// Shared memory that a block may ask for on the current device: the opt-in limit (99 KB on sm_86, 227 KB on sm_90).
/// PYRA_CUDA_SHARED_MEMORY=BYTES lowers it, so that a large GPU can stand for a small one in tests.
[[nodiscard]] size_t shared_memory_limit();

#define PYRA_CUDA(call) ::pyra::kernels::cuda::check_cuda((call), #call, __FILE__, __LINE__)
/// After a launch: configuration errors show here, others at the next synchronisation.
#define PYRA_CUDA_LAUNCHED() ::pyra::kernels::cuda::check_cuda(cudaGetLastError(), "launch", __FILE__, __LINE__)

}  // namespace pyra::kernels::cuda
