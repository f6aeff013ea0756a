// DiffRate's reduction (arXiv 2305.17997): tokens ranked by the class token's attention, the tail dropped, what lies
// beyond `merge` sent to the most alike of the kept ones.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace pyra::kernels {

/// In the words of a merge plan (merge.h). K = merge, R = prune - merge.
struct Ranking {
  at::Tensor keep;    ///< [B,K] int64: protected tokens in place, then the others by descending attention
  at::Tensor src;     ///< [B,R] int64: the next tokens in that order
  at::Tensor dst;     ///< [B,R] int64: position in `keep`, never a protected one, of the token most alike
  at::Tensor cosine;  ///< [B,R] fp32: how alike
};

/// tokens [B,N,C] fp32, class_attention [B,N] fp32. Counts include the `protected_tokens` leading ones:
/// protected < merge <= prune <= N; merge may equal protected where prune does too.
/// Ties: lowest index in the ranking; among equally alike tokens the first of `keep`. A cosine with a token of zeros
/// is 0; attention that is not a number ranks last. An image's result depends on that image alone, bit for bit.
/// Parallel over images. Reads the tokens once.
[[nodiscard]] Ranking rank_tokens(const at::Tensor& tokens, const at::Tensor& class_attention, int64_t prune,
                                  int64_t merge, int64_t protected_tokens);

/// The same by plain ATen operations in the tokens' dtype: the truth that tests compare with.
[[nodiscard]] Ranking rank_tokens_reference(const at::Tensor& tokens, const at::Tensor& class_attention, int64_t prune,
                                            int64_t merge, int64_t protected_tokens);

}  // namespace pyra::kernels
