// What linear.cpp asks of a code path, ATen or micro-kernels: one layer forward and backward on checked arguments,
// without autograd.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>

#include "kernels/linear.h"

namespace pyra::kernels {

struct LinearForward {
  at::Tensor y;
  at::Tensor slope;   ///< [rows,out] fp32: GELU'(pre-activation); only if kept and there is an activation
  at::Tensor hidden;  ///< [rows,rank] fp32: drop(x) Aᵀ; only if kept and there is a low-rank term
};

struct LinearWanted {
  bool x = false, weight = false, bias = false, a = false, b = false;
};

struct LinearGradients {
  at::Tensor x, weight, bias, a, b;
};

/// Inputs of a backward pass; slope and hidden as forward kept them.
struct LinearBackward {
  at::Tensor dy;  ///< [rows,out] in the result's dtype, contiguous
  at::Tensor x;   ///< undefined where neither W nor A learns
  at::Tensor slope, hidden;
  at::ScalarType compute;  ///< x's dtype
};

[[nodiscard]] LinearForward linear_forward_aten(const at::Tensor& x, const LinearWeights& layer,
                                                const LinearOptions& options, bool keep);
[[nodiscard]] LinearGradients linear_backward_aten(const LinearBackward& saved, const LinearWeights& layer,
                                                   const LinearOptions& options, const LinearWanted& wanted);

#if defined(PYRA_SIMD_X86)
[[nodiscard]] LinearForward linear_forward_simd(const at::Tensor& x, const LinearWeights& layer,
                                                const LinearOptions& options, bool keep);
[[nodiscard]] LinearGradients linear_backward_simd(const LinearBackward& saved, const LinearWeights& layer,
                                                   const LinearOptions& options, const LinearWanted& wanted);
#endif

/// Half-words of Philox below it drop their element: p * 65536.
[[nodiscard]] uint32_t dropout_threshold(const Dropout& options);
/// What kept elements are multiplied by.
[[nodiscard]] float dropout_scale(const Dropout& options);

/// branch_scale [images] -> contiguous [rows,1], each image's factor for each of its rows.
[[nodiscard]] at::Tensor scale_of_rows(const at::Tensor& branch_scale, int64_t rows);

/// W as the compute dtype sees it, in fp32: rounded to bf16 for bf16.
[[nodiscard]] at::Tensor rounded_weight(const at::Tensor& weight, at::ScalarType compute);

}  // namespace pyra::kernels
