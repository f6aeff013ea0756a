#include "engine/cuda/device.h"

#include <cublasLt.h>

#include "base/text.h"
#include "kernels/cuda/cuda_call.h"

namespace pyra::engine {

int set_device(int device) {
  PYRA_CUDA(cudaSetDevice(device));
  return device;
}

std::shared_ptr<kernels::cuda::GemmCache> gemm_cache(int device, bool deterministic) {
  using kernels::cuda::GemmCache;
  if (deterministic) return nullptr;
  cudaDeviceProp properties{};
  PYRA_CUDA(cudaGetDeviceProperties(&properties, device));
  int driver = 0;
  PYRA_CUDA(cudaDriverGetVersion(&driver));
  return GemmCache::shared(GemmCache::default_file(),
                           cat(properties.name, " driver ", driver, " cublasLt ", cublasLtGetVersion()));
}

}  // namespace pyra::engine
