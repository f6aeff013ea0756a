#include "engine/cuda/device.h"

#include <cublasLt.h>

#include "base/text.h"
#include "kernels/cuda/cuda_call.h"

namespace pyra::engine {

int set_device(int device) {
  PYRA_CUDA(cudaSetDevice(device));
  return device;
}

std::string gemm_version(int device) {
  cudaDeviceProp properties{};
  PYRA_CUDA(cudaGetDeviceProperties(&properties, device));
  int driver = 0;
  PYRA_CUDA(cudaDriverGetVersion(&driver));
  return cat(properties.name, " driver ", driver, " cublasLt ", cublasLtGetVersion());
}

}  // namespace pyra::engine
