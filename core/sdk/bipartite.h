// What ToMe and PYRA share: tokens split into two sides, matched, and turned into a plan.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "sdk/merge_plan.h"
#include "sdk/parameters.h"

namespace pyra::sdk {

/// How the tokens of a block are split into side A, which gives tokens away, and side B, which takes them.
struct Partition {
  bool random = false;  ///< false: A = tokens 0,2,4,…, B = tokens 1,3,5,…
  uint64_t seed = 0;    ///< random: the split is a function of (seed, number of tokens)
};

/// The parameters "partition" ("alternating" or "random") and "partition_seed", and what they say.
[[nodiscard]] std::vector<Parameter> partition_parameters();
[[nodiscard]] Partition partition_from(const Parameters& parameters);

/// Merges the r tokens of side A that are most like their partner in side B, by the cosine of `metric` [B,N,D].
/// Output order: protected tokens, the rest of A that stays, the rest of B. r as kernels::match_bipartite wants it.
/// `src` is in descending order of score. Ties: lowest index.
[[nodiscard]] MergePlan bipartite_plan(const at::Tensor& metric, int64_t r, int64_t protected_tokens,
                                       const Partition& partition);

}  // namespace pyra::sdk
