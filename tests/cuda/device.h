// Device memory for tests, and the skip where there is no GPU.
#pragma once
#include <ATen/Functions.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <limits>

#include "base/error.h"
#include "catch.h"
#include "kernels/cuda/cuda_call.h"

namespace pyra::test {

[[nodiscard]] inline bool has_gpu() {
  int count = 0;
  const bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  (void)cudaGetLastError();
  return found;
}

/// Whether Hopper's own ways are open: compute capability 9.0 exactly.
[[nodiscard]] inline bool is_hopper() {
  int device = 0, major = 0, minor = 0;
  PYRA_CUDA(cudaGetDevice(&device));
  PYRA_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  PYRA_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
}

/// First line of every test of this room: ctest counts a test that prints this as skipped (tests/CMakeLists.txt).
#define PYRA_NEEDS_GPU()                                  \
  if (!::pyra::test::has_gpu()) {                         \
    std::puts("skipped: no CUDA device on this machine"); \
    return;                                               \
  }

[[nodiscard]] inline at::ScalarType scalar_type(kernels::cuda::DType dtype) {
  using kernels::cuda::DType;
  return dtype == DType::fp32 ? at::kFloat : dtype == DType::bf16 ? at::kBFloat16 : at::kHalf;
}

/// A tensor's bytes on the device: made from a CPU tensor, or by shape and filled with NaN so that what a kernel leaves
/// unwritten shows.
class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& cpu) : host_(cpu.contiguous()) {
    PYRA_CUDA(cudaMalloc(&data_, std::max<size_t>(16, host_.nbytes())));
    PYRA_CUDA(cudaMemcpy(data_, host_.const_data_ptr(), host_.nbytes(), cudaMemcpyHostToDevice));
  }
  OnDevice(at::IntArrayRef shape, at::ScalarType type) : OnDevice(poison(shape, type)) {}
  ~OnDevice() { (void)cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  template <class T = void>
  [[nodiscard]] T* get() const {
    return static_cast<T*>(data_);
  }
  /// Waits for the device and copies back.
  [[nodiscard]] at::Tensor cpu() const {
    at::Tensor out = at::empty_like(host_);
    PYRA_CUDA(cudaDeviceSynchronize());
    PYRA_CUDA(cudaMemcpy(out.data_ptr(), data_, out.nbytes(), cudaMemcpyDeviceToHost));
    return out;
  }

 private:
  static at::Tensor poison(at::IntArrayRef shape, at::ScalarType type) {
    return at::isFloatingType(type) ? at::full(shape, std::numeric_limits<double>::quiet_NaN(), type)
                                    : at::full(shape, -1, type);
  }
  at::Tensor host_;
  void* data_ = nullptr;
};

/// How far a result may be from its reference, relative to the largest: bf16 and fp16 round what enters, what is kept
/// and what leaves to 8 and 11 bits.
[[nodiscard]] inline double rounding_limit(kernels::cuda::DType dtype, double fp32 = 1e-5) {
  using kernels::cuda::DType;
  return dtype == DType::fp32 ? fp32 : dtype == DType::bf16 ? 1e-2 : 2e-3;
}

/// What kernels that go head by head refuse alike: code_of(change) is the exit code of a call that was right before
/// change(call).
template <class Call, class CodeOf>
void check_head_limits(const CodeOf& code_of) {
  CHECK(code_of([](Call& call) { call.batch = 0; }) == ExitCode::ok);
  CHECK(code_of([](Call& call) { call.batch = -1; }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.tokens = 0; }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.tokens = 1025; }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.heads = 0; }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.head_dim = 24; }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.head_dim = 144; }) == ExitCode::usage);
}

}  // namespace pyra::test
