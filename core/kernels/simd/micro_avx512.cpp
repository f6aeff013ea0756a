// The micro-kernels for AVX-512.
#include "kernels/simd/vector_avx512.h"
// The vector comes first: all else is written in it.
#include "kernels/simd/attention_backward_tile.h"
#include "kernels/simd/dropout_avx512.h"
#include "kernels/simd/gemm_tile.h"
#include "kernels/simd/rows.h"

namespace pyra::kernels::simd {

const MicroKernels kAvx512{
    kPanel,     gemm<float, float>, attention,   attention_backward, layer_norm, layer_norm_backward, widen, narrow,
    scale_rows, add_outer,          add_columns, dropout_bits,       mask};

}  // namespace pyra::kernels::simd
