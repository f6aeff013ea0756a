// GELU and its slope as passes of their own, for where the matrix product's epilogue has neither (exact GELU, a LoRA
// term behind it).
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

/// y = GELU(x), by erf or in its tanh form. x and y [count] of `dtype`, 16-byte aligned; count a multiple of 8; y may
/// be x. In fp32 inside.
void gelu_forward(const void* x, void* y, DType dtype, int64_t count, bool tanh, cudaStream_t stream);
/// d *= GELU'(x), likewise.
void gelu_backward(const void* x, void* d, DType dtype, int64_t count, bool tanh, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
