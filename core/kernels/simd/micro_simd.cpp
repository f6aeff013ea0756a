#include "kernels/cpu_kernel.h"
#include "kernels/simd/simd.h"

namespace pyra::kernels::simd {

const MicroKernels& micro() {
  return cpu_kernel() >= CpuKernel::avx512 ? kAvx512 : kAvx2;
}

}  // namespace pyra::kernels::simd
