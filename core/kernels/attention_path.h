// What attention.cpp asks of a code path: forward and backward on checked arguments, without autograd.
#pragma once
#include <ATen/core/Tensor.h>

#include "kernels/attention.h"

namespace pyra::kernels {

struct AttentionForward {
  AttentionOutput output;
  at::Tensor log_sum;  ///< [B,H,N] fp32: log of each row's sum of exponentials; only if kept
};

/// Inputs of a backward pass.
struct AttentionBackward {
  at::Tensor dout;  ///< [B,N,C] in qkv's dtype, contiguous
  at::Tensor qkv, log_sum, sizes;
  int64_t num_heads = 0;
};

[[nodiscard]] AttentionForward attention_forward_aten(const at::Tensor& qkv, int64_t num_heads,
                                                      const AttentionOptions& options, bool keep);
/// dqkv [B,N,3C] in qkv's dtype.
[[nodiscard]] at::Tensor attention_backward_aten(const AttentionBackward& saved);

#if defined(PYRA_SIMD_X86)
[[nodiscard]] AttentionForward attention_forward_simd(const at::Tensor& qkv, int64_t num_heads,
                                                      const AttentionOptions& options, bool keep);
[[nodiscard]] at::Tensor attention_backward_simd(const AttentionBackward& saved);
#endif

}  // namespace pyra::kernels
