// A linear layer of a few normalised rows, in one kernel: the classifier of a small batch.
#pragma once
#include "kernels/cuda/layer_norm.h"
#include "kernels/cuda/linear.h"

namespace pyra::kernels::cuda {

/// layer.y = LayerNorm(norm.x) Wᵀ + b (+ residual), all in fp32; norm.y, which is layer.x, is not written. False, and
/// nothing done, where that is not for this kernel: more than 8 rows or 1536 channels, other types than fp32 behind the
/// norm, an epilogue, a strided or transposed layer. A row's result does not depend on the others.
[[nodiscard]] bool norm_linear(const LayerNormCall& norm, const LinearCall& layer, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
