#include "sdk/plan_recipe.h"

#include <algorithm>

#include "base/philox.h"
#include "kernels/rank.h"
#include "sdk/bipartite.h"
#include "sdk/token_merger.h"

namespace pyra::sdk {

/// As many tokens as the alternating split puts in A, protected tokens where it puts them, the others drawn.
std::vector<int64_t> side_a(const Partition& partition, int64_t tokens, int64_t protected_tokens) {
  if (!partition.random) return {};
  const Philox random(partition.seed, RandomStream::partition, uint64_t(tokens));
  const int64_t protected_in_a = (protected_tokens + 1) / 2;
  const int64_t drawn = (tokens + 1) / 2 - protected_in_a;
  std::vector<int64_t> order = random.permutation(tokens - protected_tokens);
  std::vector<int64_t> side;
  for (int64_t i = 0; i < protected_in_a; ++i) side.push_back(2 * i);
  for (int64_t i = 0; i < drawn; ++i) side.push_back(protected_tokens + order[size_t(i)]);
  std::sort(side.begin(), side.end());
  return side;
}

MergePlan make_plan(const PlanRecipe& recipe, const MergeInputs& in) {
  if (recipe.kind == PlanKind::rank) {
    auto ranking = kernels::rank_tokens(in.tokens, in.class_attention, recipe.prune, recipe.merge, in.protected_tokens);
    return {.keep = std::move(ranking.keep),
            .src = std::move(ranking.src),
            .dst = std::move(ranking.dst),
            .reduce = Reduce::mean,
            .src_size_scale = std::move(ranking.cosine)};
  }
  MergePlan plan = bipartite_plan(in.key_mean, recipe.remove, in.protected_tokens, recipe.partition);
  plan.gate = recipe.gate;
  return plan;
}

}  // namespace pyra::sdk
