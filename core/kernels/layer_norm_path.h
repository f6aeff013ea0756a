// What layer_norm.cpp asks of a code path: forward and backward on checked arguments, without autograd.
#pragma once
#include <ATen/core/Tensor.h>

namespace pyra::kernels {

struct LayerNormForward {
  at::Tensor y;
  at::Tensor mean, rstd;  ///< [rows] fp32; only if kept
};

struct LayerNormBackward {
  at::Tensor dy;  ///< [rows,C] in the result's dtype, contiguous
  at::Tensor x, weight, mean, rstd;
};

struct LayerNormWanted {
  bool x = false, weight = false, bias = false;
};

struct LayerNormGradients {
  at::Tensor x, weight, bias;
};

[[nodiscard]] LayerNormForward layer_norm_forward_aten(const at::Tensor& x, const at::Tensor& weight,
                                                       const at::Tensor& bias, double eps, at::ScalarType out_dtype);
[[nodiscard]] LayerNormGradients layer_norm_backward_aten(const LayerNormBackward& saved,
                                                          const LayerNormWanted& wanted);

#if defined(PYRA_SIMD_X86)
[[nodiscard]] LayerNormForward layer_norm_forward_simd(const at::Tensor& x, const at::Tensor& weight,
                                                       const at::Tensor& bias, double eps, at::ScalarType out_dtype,
                                                       bool keep);
[[nodiscard]] LayerNormGradients layer_norm_backward_simd(const LayerNormBackward& saved,
                                                          const LayerNormWanted& wanted);
#endif

}  // namespace pyra::kernels
