// ToMe's bipartite soft matching (arXiv 2210.09461, section 3).
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

namespace pyra::kernels {

/// Where the tokens go, in the words of a merge plan (merge.h).
struct Matching {
  at::Tensor keep;  ///< [B,N-r] int64: protected tokens, the rest of side A that stays, the rest of side B; ascending
  at::Tensor src;   ///< [B,r] int64: tokens of A merged away, by descending score
  at::Tensor dst;   ///< [B,r] int64: position in `keep` of the B token that src goes to
};

/// metric [B,N,D] fp32 or bf16, not normalised. Every token of side A looks for the token of side B with the highest
/// cosine; the r best pairs merge. Side A is 0,2,4,… or, if given, the ascending list `side_a`; B is the rest.
/// Protected tokens (class at 0; with two, distillation at 1) neither leave nor receive: r may be at most the number
/// of other tokens in A, and 0 when B has none. For the alternating sides that is r <= (N - protected) / 2.
/// Ties: lowest index, on both sides. A token of zeros has cosine 0 with all; one that is not finite is chosen last.
/// An image's result depends on that image alone, bit for bit. Parallel over images. Reads the metric once.
[[nodiscard]] Matching match_bipartite(const at::Tensor& metric, int64_t r, int64_t protected_tokens,
                                       std::span<const int64_t> side_a = {});

/// The same by plain ATen operations in the metric's dtype: the truth that tests compare with.
[[nodiscard]] Matching match_bipartite_reference(const at::Tensor& metric, int64_t r, int64_t protected_tokens,
                                                 std::span<const int64_t> side_a = {});

}  // namespace pyra::kernels
