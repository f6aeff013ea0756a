// What mergers that match two sides share: the parameters that say how tokens are split, and the plan.
#pragma once
#include <vector>

#include "sdk/parameters.h"
#include "sdk/plan_recipe.h"

namespace pyra::sdk {

/// The parameters "partition" ("alternating" or "random") and "partition_seed", and what they say.
[[nodiscard]] std::vector<Parameter> partition_parameters();
[[nodiscard]] Partition partition_from(const Parameters& parameters);

/// Merges the r tokens of side A that are most like their partner in side B, by the cosine of `metric` [B,N,D].
/// Output order: protected tokens, the rest of A that stays, the rest of B. r as kernels::match_bipartite wants it.
/// `src` is in descending order of score. Ties: lowest index.
[[nodiscard]] MergePlan bipartite_plan(const at::Tensor& metric, int64_t r, int64_t protected_tokens,
                                       const Partition& partition);

}  // namespace pyra::sdk
