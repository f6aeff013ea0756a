#include "kernels/simd/gemm_tile.h"

namespace pyra::kernels::simd {

void gemm_avx512(const GemmCall& call, int64_t rows) {
  gemm<float, float>(call, rows);
}

}  // namespace pyra::kernels::simd
