// LayerNorm over the last dimension: y = (x - mean) / sqrt(var + eps) * weight + bias.
#pragma once
#include <ATen/core/Tensor.h>

namespace pyra::kernels {

/// x [rows,C] fp32 -> [rows,C] in `out_dtype` (fp32 or bf16); weight, bias [C] fp32; statistics in fp32.
/// Differentiable in x, and in weight and bias where they require gradients. Backward keeps x, mean and rstd
/// and recomputes the normalised rows. Reads x once, writes y once.
[[nodiscard]] at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps,
                                    at::ScalarType out_dtype);

[[nodiscard]] at::Tensor layer_norm_reference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                              double eps, at::ScalarType out_dtype);

}  // namespace pyra::kernels
