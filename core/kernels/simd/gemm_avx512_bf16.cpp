#include "kernels/simd/gemm_tile.h"

namespace pyra::kernels::simd {

void gemm_avx512_bf16(const GemmCall& call, int64_t rows) {
  gemm<uint16_t, uint32_t>(call, rows);
}

}  // namespace pyra::kernels::simd
