#include "engine/cuda/device.h"

#include <cublasLt.h>

#include <algorithm>

#include "base/error.h"
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
  // Raised when algorithms are chosen another way: what the old one chose is not taken over.
  constexpr int kWayOfChoosing = 2;
  return GemmCache::shared(GemmCache::default_file(), cat(properties.name, " driver ", driver, " cublasLt ",
                                                          cublasLtGetVersion(), " chosen ", kWayOfChoosing));
}

void check_room(const std::string& what, int images, const std::function<size_t(int)>& bytes_for, const char* option) {
  size_t free_bytes = 0, total = 0;
  PYRA_CUDA(cudaMemGetInfo(&free_bytes, &total));
  const size_t wanted = bytes_for(images);
  if (wanted <= free_bytes) return;
  const size_t each = bytes_for(2) - bytes_for(1);
  fail(ExitCode::device, "the GPU has ", free_bytes >> 20, " MB free of ", total >> 20, "; ", what, " needs ",
       wanted >> 20, " MB beside the weights; ", option, std::max<size_t>(1, free_bytes * 9 / 10 / each), " would fit");
}

}  // namespace pyra::engine
