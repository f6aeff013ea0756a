// Multi-head self-attention for the short sequences of ViTs, with ToMe's proportional attention:
//   softmax(q kᵀ / sqrt(D) + log(size_key)) v                        (arXiv 2210.09461, eq. 1)
#pragma once
#include <ATen/core/Tensor.h>

namespace pyra::kernels {

struct AttentionOutput {
  at::Tensor out;              ///< [B,N,C] in qkv's dtype, heads side by side
  at::Tensor key_mean;         ///< [B,N,D] fp32 mean over heads of the keys, no gradient; if wanted
  at::Tensor class_attention;  ///< [B,N] fp32 mean over heads of the class row's probabilities, no gradient; if wanted
};

struct AttentionOptions {
  at::Tensor sizes{};  ///< [B,N] fp32, positive, or undefined: log(size) of a key is added to its logits
  bool key_mean = false;
  bool class_attention = false;
};

/// qkv [B,N,3C] (q, k, v side by side, each H heads of D) fp32 or bf16, contiguous. Softmax and sums in fp32.
/// Differentiable in qkv; backward recomputes the probabilities from the saved row maxima and sums, so memory
/// is O(B H N), not O(B H N²). An image's result is bit-equal whatever the batch. Parallel over (image, head).
[[nodiscard]] AttentionOutput attention(const at::Tensor& qkv, int64_t num_heads, const AttentionOptions& options = {});

[[nodiscard]] AttentionOutput attention_reference(const at::Tensor& qkv, int64_t num_heads,
                                                  const AttentionOptions& options = {});

}  // namespace pyra::kernels
