#include "train/rate_masks.h"

#include <cmath>

#include "base/error.h"
#include "kernels/masked_attention.h"
#include "kernels/merge.h"
#include "kernels/rank.h"

namespace pyra::train {

Rate rate_of(const at::Tensor& logits, int64_t patches, int64_t protected_tokens) {
  const int64_t candidates = logits.numel();
  if (logits.dim() != 1 || candidates < 1 || candidates > patches)
    fail(ExitCode::internal, "rate: logits are ", logits.sizes(), ", expected 1 to ", patches, " of them");
  const at::Tensor p = at::softmax(logits, 0);
  const at::Tensor expected = (p * at::arange(patches, patches - candidates, -1, logits.options())).sum();
  Rate rate;
  // Rounding errors must not make more of all.
  rate.count = std::min(patches, int64_t(std::ceil(expected.item<double>()))) + protected_tokens;
  rate.kept = expected - expected.detach() + double(rate.count);
  // The patch ranked r-th survives under the candidates that keep more than r, which are the first patches - r.
  const at::Tensor last = at::arange(patches - 1, -1, -1, at::kLong).clamp_max(candidates - 1);
  rate.survival = at::cat({at::ones({protected_tokens}, logits.options()), p.cumsum(0).index_select(0, last)});
  return rate;
}

at::Tensor survival_mask(const Rate& rate, int64_t present) {
  const at::Tensor position = at::arange(rate.survival.size(0), at::kLong);
  const at::Tensor hard = (position < rate.count).logical_or(position >= present).to(rate.survival.scalar_type());
  const at::Tensor soft = rate.survival * (position < present);
  // In this order the sum is exact.
  return hard + (soft - soft.detach());
}

KeptCounts kept_counts(const Rates& rates, int64_t tokens) {
  KeptCounts counts;
  for (size_t block = 0; block < rates.prune.size(); ++block) {
    counts.prune.push_back(std::min(tokens, rates.prune[block].count));
    counts.merge.push_back(std::min(counts.prune.back(), rates.merge[block].count));
    tokens = counts.merge.back();
  }
  return counts;
}

std::vector<kernels::SoftCounts> soft_counts(const KeptCounts& counts, int64_t tokens) {
  std::vector<kernels::SoftCounts> blocks;
  int present = int(tokens);
  for (size_t block = 0; block < counts.prune.size(); ++block) {
    blocks.push_back({.present = present, .pruned = int(counts.prune[block]), .kept = int(counts.merge[block])});
    present = blocks.back().kept;
  }
  return blocks;
}

at::Tensor soft_macs(const nn::VitConfig& config, const Rates& rates) {
  const std::vector<int64_t> kept = kept_counts(rates, config.tokens()).merge;
  at::Tensor macs = at::scalar_tensor(double(nn::count_macs(config, kept)), at::kDouble);
  const auto dim = double(config.embed_dim);
  for (size_t block = 0; block < kept.size(); ++block) {
    // What one more token costs: in this block's MLP, and in the next block before it reduces.
    double each = 2 * dim * double(config.mlp_dim);
    if (block + 1 < kept.size()) each += 4 * dim * dim + 4 * double(kept[block]) * dim;
    for (const at::Tensor& count : {rates.prune[block].kept, rates.merge[block].kept}) {
      const at::Tensor wide = count.to(at::kDouble);
      macs = macs + each * (wide - wide.detach());
    }
  }
  return macs;
}

RateMasks::RateMasks(const nn::VitConfig& config, const Rates& rates, int64_t batch, bool proportional)
    : config_(config),
      rates_(rates),
      counts_(soft_counts(kept_counts(rates, config.tokens()), config.tokens())),
      proportional_(proportional),
      mask_(at::ones({batch, config.tokens()}, at::kFloat)),
      sizes_(mask_),
      present_(config.tokens()) {}

at::Tensor RateMasks::attend(int64_t, const at::Tensor& qkv) {
  kernels::MaskedAttentionOutput result =
      kernels::masked_attention(qkv, config_.num_heads, proportional_ ? sizes_ : at::ones_like(sizes_), mask_);
  class_attention_ = std::move(result.class_attention);
  return std::move(result.out);
}

at::Tensor RateMasks::reduce(int64_t block, const at::Tensor& x) {
  const Rate &prune = rates_.prune[size_t(block)], &merge = rates_.merge[size_t(block)];
  const kernels::SoftCounts& counts = counts_[size_t(block)];
  const int64_t tokens = x.size(1), pruned = counts.pruned, kept = counts.kept, tail = counts.tail();
  // A token that is gone gets the least attention of all, but another may have got as little.
  const at::Tensor attention = class_attention_.masked_fill(mask_.detach() < 0.5, -1.0);
  const kernels::Ranking ranking =
      kernels::rank_tokens(x.detach(), attention, tokens, kept, config_.protected_tokens());
  const at::Tensor dst = ranking.dst.narrow(1, 0, tail);
  const auto take = [&](const at::Tensor& keep, int64_t sources) {
    const kernels::MergeArguments plan{
        .keep = keep, .src = ranking.src.narrow(1, 0, sources), .dst = dst.narrow(1, 0, sources), .weighted = false};
    return kernels::merge_tokens(x, sizes_, plan).tokens;
  };
  at::Tensor reduced = take(ranking.keep, tail);
  if (kept < tokens) reduced = at::cat({reduced, take(ranking.src, 0)}, 1);

  const at::Tensor order = at::cat({ranking.keep, ranking.src}, 1);
  sizes_ = sizes_.gather(1, order);
  if (counts.merges()) {
    // Clamped, for the logarithm's sake: a cosine may be small or negative.
    at::Tensor sizes = sizes_.clone();
    sizes.narrow(1, kept, tail).mul_(ranking.cosine.narrow(1, 0, tail));
    sizes.narrow(1, 0, pruned).clamp_min_(1);
    sizes.narrow(1, 0, kept).scatter_add_(1, dst, sizes.narrow(1, kept, tail));
    sizes_ = sizes;
  }
  mask_ = mask_.gather(1, order);
  if (counts.prunes()) mask_ = mask_ * survival_mask(prune, counts.present);
  if (counts.merges()) mask_ = mask_ * survival_mask(merge, pruned);
  present_ = kept;
  return reduced;
}

}  // namespace pyra::train
