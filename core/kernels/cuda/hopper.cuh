// The host's part of kernels for sm_90a: the device asked once, maps for the copy engine.
#pragma once
#include <cuda.h>

#include <algorithm>

#include "base/error.h"
#include "kernels/cuda/device.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kGroup = 128;  ///< threads of a warpgroup

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/// The driver's function, which libcudart has no word for; null where the driver lacks it.
inline Encode encoder() {
  static const Encode found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) {
      (void)cudaGetLastError();
      entry = nullptr;
    }
    return reinterpret_cast<Encode>(entry);
  }();
  return found;
}

constexpr int kBoxChannels = 64;  ///< 128 bytes, swizzled as describe() in wgmma.cuh wants them

/// Rows of 2-byte channels as [image, row, channel], in boxes of `rows` rows and kBoxChannels; zeros past the last row.
inline CUtensorMap map_of(const void* data, int channels, int tokens, int batch, int rows, DType dtype) {
  const cuuint64_t sizes[] = {cuuint64_t(channels), cuuint64_t(tokens), cuuint64_t(batch)};
  const cuuint64_t strides[] = {cuuint64_t(channels) * 2, cuuint64_t(channels) * 2 * tokens};
  const cuuint32_t box[] = {kBoxChannels, cuuint32_t(rows), 1}, steps[] = {1, 1, 1};
  const auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  CUtensorMap map;
  const CUresult status =
      encoder()(&map, type, 3, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    fail(ExitCode::device, "the driver refuses a map of ", batch, " x ", tokens, " rows of ", channels,
         " channels (error ", int(status), ")");
  }
  return map;
}

/// Whether the program holds the kernel for this device, which then may use all the shared memory there is. Asked once.
template <auto kKernel>
bool prepare_hopper() {
  static std::atomic<int> known[64];  // 1: ready, -1: built without sm_90a
  return asked_once(known, [](int) {
           cudaFuncAttributes attributes{};
           PYRA_CUDA(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel)));
           if (attributes.maxThreadsPerBlock < kGroup) return -1;
           allow_shared_memory<kKernel, true>();
           return 1;
         }) > 0;
}

struct HopperDevice {
  bool usable = false;
  int processors = 0;
};

/// The current device, asked once.
inline HopperDevice hopper_device() {
  static std::atomic<int> known[64];  // -1: not usable, else its multiprocessors
  const int answer = asked_once(known, [](int device) {
    int major = 0, minor = 0;
    PYRA_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    PYRA_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return major == 9 && minor == 0 && encoder() != nullptr ? multiprocessors() : -1;
  });
  return {answer > 0, std::max(answer, 0)};
}

}  // namespace
}  // namespace pyra::kernels::cuda
