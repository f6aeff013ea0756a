// Self-attention under a soft mask over keys, through which DiffRate's search trains (arXiv 2305.17997; the mask's form
// is DynamicViT's, arXiv 2106.02034, eq. 11):
//   e_ij = exp(q_i k_jᵀ / sqrt(D) + log(size_j) - max_j(…)) * (1 where i = j, else mask_j)
//   p_ij = (e_ij + eps / N) / (sum_j e_ij + eps),   eps = 1e-6,   out = p v
// A token that is masked out is seen by nobody but itself, and still learns what it would be worth: the gradient of
// mask_j asks what e_ij would have changed.
#pragma once
#include <ATen/core/Tensor.h>

namespace pyra::kernels {

struct MaskedAttentionOutput {
  at::Tensor out;              ///< [B,N,C] in qkv's dtype, heads side by side
  at::Tensor class_attention;  ///< [B,N] fp32 mean over heads of the class row of p, no gradient
};

/// qkv [B,N,3C] fp32 or bf16, contiguous; sizes [B,N] fp32, positive, no gradient; mask [B,N] fp32, 0 or 1 as a rule.
/// The maximum runs over all keys, masked ones too. Differentiable in qkv and mask; backward recomputes p, so memory is
/// that of the arguments. An image's result is bit-equal whatever the batch and the number of threads. Parallel over
/// images. Error(internal) for arguments of other shapes or dtypes.
[[nodiscard]] MaskedAttentionOutput masked_attention(const at::Tensor& qkv, int64_t num_heads, const at::Tensor& sizes,
                                                     const at::Tensor& mask);

/// The same by plain ATen operations in qkv's dtype (fp32 or fp64), differentiable by ATen's autograd: the truth that
/// tests compare with.
[[nodiscard]] MaskedAttentionOutput masked_attention_reference(const at::Tensor& qkv, int64_t num_heads,
                                                               const at::Tensor& sizes, const at::Tensor& mask);

}  // namespace pyra::kernels
