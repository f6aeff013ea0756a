// A merge plan described by what it is made from: known before any token is.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "sdk/merge_plan.h"

namespace pyra::sdk {

struct MergeInputs;

/// How the tokens of a block are split into side A, which gives tokens away, and side B, which takes them.
struct Partition {
  bool random = false;  ///< false: A = tokens 0,2,4,…, B = tokens 1,3,5,…
  uint64_t seed = 0;    ///< random: the split is a function of (seed, number of tokens)
};

enum class PlanKind {
  bipartite,  ///< kernels::match_bipartite on the mean over heads of the keys: ToMe, PYRA
  rank,       ///< kernels::rank_tokens on the class token's attention: DiffRate
};

/// The core makes the plan of it: on the CPU by make_plan, on a GPU by fused kernels inside the captured graph. What a
/// recipe needs (keys, class attention) the merger's needs() must say.
struct PlanRecipe {
  PlanKind kind = PlanKind::bipartite;
  int64_t remove = 0;            ///< bipartite: r
  Partition partition{};         ///< bipartite
  std::optional<Gate> gate{};    ///< bipartite: PYRA
  int64_t prune = 0, merge = 0;  ///< rank: kept counts, protected tokens included
};

/// The plan that `recipe` stands for, on the CPU.
[[nodiscard]] MergePlan make_plan(const PlanRecipe& recipe, const MergeInputs& in);

/// The tokens of side A for a sequence of `tokens`, ascending; empty for the alternating split.
[[nodiscard]] std::vector<int64_t> side_a(const Partition& partition, int64_t tokens, int64_t protected_tokens);

}  // namespace pyra::sdk
