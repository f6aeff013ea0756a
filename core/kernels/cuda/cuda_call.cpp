#include "kernels/cuda/cuda_call.h"

#include <algorithm>
#include <cstdlib>

#include "base/error.h"

namespace pyra::kernels::cuda {

void check_cuda(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  const char* name = file;
  for (const char* c = file; *c; ++c)
    if (*c == '/') name = c + 1;
  fail(ExitCode::device, "CUDA: ", cudaGetErrorName(status), " (", cudaGetErrorString(status), ") at ", name, ":", line,
       ": ", call);
}

size_t shared_memory_limit() {
  int device = 0, bytes = 0;
  PYRA_CUDA(cudaGetDevice(&device));
  PYRA_CUDA(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const char* lower = std::getenv("PYRA_CUDA_SHARED_MEMORY");
  if (lower && *lower) bytes = std::min(bytes, std::max(48 << 10, std::atoi(lower)));
  return size_t(bytes);
}

}  // namespace pyra::kernels::cuda
