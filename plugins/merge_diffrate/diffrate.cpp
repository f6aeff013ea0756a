// DiffRate (arXiv 2305.17997) by counts of tokens to keep: patch tokens are ranked by the class token's attention,
// those beyond `prune` are dropped, and those beyond `merge` are averaged into the most alike of the tokens that stay.
#include "base/error.h"
#include "sdk/plugin.h"

namespace {

using namespace pyra::sdk;
using pyra::ExitCode;
using pyra::fail;

/// Counts that cost the MACs of a schedule of removed tokens: as many tokens leave each block, half of them (the
/// smaller half) pruned and the rest merged.
Schedule counts_from_remove(const Schedule& schedule, const ModelShape& shape) {
  Schedule counts = cut_to_half(schedule, shape);
  int64_t tokens = shape.tokens;
  for (const int64_t removed : counts.remove) {
    tokens -= removed;
    counts.merge.push_back(tokens);
    counts.prune.push_back(tokens + (removed + 1) / 2);
  }
  counts.remove.clear();
  return counts;
}

void check_count(const Schedule& schedule, const char* list, int64_t block, int64_t count, const ModelShape& shape) {
  const int64_t least = shape.protected_tokens + 1;
  if (count >= least && count <= shape.tokens) return;
  fail(ExitCode::usage, "schedule '", schedule.text, "': ", list, "[", block, "] keeps ", count, " tokens; expected ",
       least, " to ", shape.tokens, ", the class token included");
}

class DiffRate final : public TokenMerger {
 public:
  static std::vector<Parameter> parameters() { return {}; }
  explicit DiffRate(const Parameters&) {}

  [[nodiscard]] Needs needs() const override { return {.class_attention = true}; }
  [[nodiscard]] bool conserves_size() const override { return false; }
  /// Tokens are put in order of attention even where all stay.
  [[nodiscard]] bool acts(int64_t, int64_t) const override { return true; }

  /// Counts above the number of tokens that enter a block mean that all stay, as in the published lists.
  [[nodiscard]] Schedule resolve(const Schedule& schedule, const ModelShape& shape) const override {
    if (schedule.prune.empty() && schedule.merge.empty()) return counts_from_remove(schedule, shape);
    const auto depth = size_t(shape.depth);
    if (schedule.prune.size() != depth || schedule.merge.size() != depth) {
      fail(ExitCode::usage, "schedule '", schedule.text, "' has ", schedule.prune.size(), " prune and ",
           schedule.merge.size(), " merge counts; the model has ", depth, " blocks");
    }
    Schedule counts = schedule;
    counts.remove.clear();
    int64_t tokens = shape.tokens;
    for (size_t block = 0; block < depth; ++block) {
      int64_t &prune = counts.prune[block], &merge = counts.merge[block];
      check_count(schedule, "prune", int64_t(block), prune, shape);
      check_count(schedule, "merge", int64_t(block), merge, shape);
      if (merge > prune) {
        fail(ExitCode::usage, "schedule '", schedule.text, "': merge[", block, "] keeps ", merge, " of the ", prune,
             " tokens that prune[", block, "] leaves; expected no more than those");
      }
      prune = std::min(prune, tokens);
      merge = std::min(merge, prune);
      tokens = merge;
    }
    return counts;
  }

  [[nodiscard]] std::vector<int64_t> tokens_after(const Schedule& schedule, const ModelShape&) const override {
    return schedule.merge;
  }

  [[nodiscard]] std::optional<PlanRecipe> recipe(int64_t block, const Schedule& schedule,
                                                 const TensorMap&) const override {
    return PlanRecipe{
        .kind = PlanKind::rank, .prune = schedule.prune[size_t(block)], .merge = schedule.merge[size_t(block)]};
  }
};

}  // namespace

PYRA_MERGE_PLUGIN(
    DiffRate, "diffrate", "1.0",
    "Pruning and merging by class attention, by counts given or searched for (DiffRate, arXiv 2305.17997)")
