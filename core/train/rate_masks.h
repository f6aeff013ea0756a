// DiffRate's differentiable rates (arXiv 2305.17997, section 3.2): how many tokens a block keeps, as a function of
// logits, and the masks through which a forward pass feels it.
//
// Every block has two rates, one for pruning and one for merging. A rate is a distribution p = softmax(logits) over
// candidates, "keep all patches", "keep one less", …; block 0 has but the first, so it keeps all.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "kernels/soft_counts.h"
#include "nn/config.h"
#include "nn/soft_reduction.h"

namespace pyra::train {

/// What one vector of logits says.
struct Rate {
  int64_t count = 0;    ///< tokens kept, protected ones included: ceil(sum p_i candidate_i) + protected
  at::Tensor kept;      ///< the same as a scalar; its gradient is that of the sum before it is rounded up
  at::Tensor survival;  ///< [N] probability that the token ranked at a position stays; 1 for the protected ones
};

/// logits [n], 1 <= n <= patches: candidates patches, patches - 1, …, patches - n + 1. Differentiable.
[[nodiscard]] Rate rate_of(const at::Tensor& logits, int64_t patches, int64_t protected_tokens);

/// Of the first `present` positions, those from rate.count on become 0, the others stay 1, and so do the positions
/// behind `present`, which are gone already. Exactly 0 and 1; the gradient is the survival probability's
/// (straight-through). [N].
[[nodiscard]] at::Tensor survival_mask(const Rate& rate, int64_t present);

/// The rates of a model's blocks.
struct Rates {
  std::vector<Rate> prune, merge;
};

/// Kept counts, class token included, as DiffRate's schedule has them: never rising, merge <= prune.
struct KeptCounts {
  std::vector<int64_t> prune, merge;
  bool operator==(const KeptCounts&) const = default;
};

/// What the rates keep where the counts of earlier blocks are a limit too: min(tokens, prune), min(that, merge).
[[nodiscard]] KeptCounts kept_counts(const Rates& rates, int64_t tokens);

/// The same block by block, each with what the one before it left.
[[nodiscard]] std::vector<kernels::SoftCounts> soft_counts(const KeptCounts& counts, int64_t tokens);

/// nn::count_macs of those counts as a scalar (fp64) whose gradient reaches every rate, also one that is not the
/// least: N' = min(N, prune, merge) is straight-through in prune and merge, and constant in N (the authors' program).
[[nodiscard]] at::Tensor soft_macs(const nn::VitConfig& config, const Rates& rates);

/// A forward pass that all tokens go through, those that the rates drop or merge away masked out
/// (ForwardOptions::soft). In every block: attention under the mask; tokens ranked by the class token's attention,
/// those that are gone last; prune; then each of the tail is averaged into the most alike of the kept, and stays,
/// masked out, behind them.
class RateMasks final : public nn::SoftReduction {
 public:
  /// For one forward pass of `batch` images; keeps references. With `proportional` a token weighs as many as it is.
  RateMasks(const nn::VitConfig& config, const Rates& rates, int64_t batch, bool proportional = true);

  [[nodiscard]] at::Tensor attend(int64_t block, const at::Tensor& qkv) override;
  [[nodiscard]] at::Tensor reduce(int64_t block, const at::Tensor& x) override;
  [[nodiscard]] const at::Tensor& mask() const override { return mask_; }
  /// [B,N] fp32, no gradient: how many patches a token stands for.
  [[nodiscard]] const at::Tensor& sizes() const { return sizes_; }
  /// Tokens not masked out; the same in all images.
  [[nodiscard]] int64_t present() const { return present_; }

 private:
  const nn::VitConfig& config_;
  const Rates& rates_;
  std::vector<kernels::SoftCounts> counts_;
  bool proportional_;
  at::Tensor mask_, sizes_;     // [B,N]
  at::Tensor class_attention_;  // [B,N] of the block between attend and reduce
  int64_t present_ = 0;
};

}  // namespace pyra::train
