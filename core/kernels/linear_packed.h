// The layout the micro-kernels read weights in.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>

#include "kernels/linear.h"

namespace pyra::kernels {

/// A matrix M [k,n] cut into panels of P columns, each panel [k][P], the last padded with zero columns, so that a
/// micro-kernel reads it front to back; P is the micro-kernel's (32 for AVX-512, 16 for AVX2). bf16: [ceil(k/2)][P][2],
/// pairs along k side by side as VDPBF16PS wants them; a CPU without that instruction gets the rounded numbers in fp32.
struct LinearWeights::Packed {
  at::Tensor panels;  ///< flat, fp32 or bf16
  int64_t k = 0, n = 0;
};

/// Packs Wᵀ (for y = x Wᵀ), or W itself when `transposed` (for dx = dy W).
[[nodiscard]] std::shared_ptr<const LinearWeights::Packed> pack(const at::Tensor& weight, at::ScalarType compute,
                                                                bool transposed);

}  // namespace pyra::kernels
