// The contract of a merge plugin.
#pragma once
#include <ATen/core/Tensor.h>

#include <string_view>
#include <vector>

#include "sdk/merge_plan.h"
#include "sdk/model_shape.h"
#include "sdk/plan_recipe.h"
#include "sdk/tensor_decl.h"

namespace pyra::sdk {

/// What plan() wants to see; the core computes nothing that no one asks for.
struct Needs {
  bool key_mean = false;         ///< MergeInputs::key_mean
  bool class_attention = false;  ///< MergeInputs::class_attention
};

/// Read-only views of one block after attention, before the MLP. B images, N tokens, C channels, D = C/H.
/// fp32, detached from autograd, except `learned`.
struct MergeInputs {
  int64_t block = 0;
  int64_t protected_tokens = 1;
  at::Tensor tokens;           ///< [B,N,C] residual stream
  at::Tensor sizes;            ///< [B,N] how many patches each token stands for
  at::Tensor key_mean;         ///< [B,N,D] mean over heads of the keys, after PEFT; if needed
  at::Tensor class_attention;  ///< [B,N] mean over heads of the class token's attention; if needed
  const TensorMap& learned;    ///< this plugin's own tensors, all blocks, by declared name
};

/// Decides, per block, which tokens stay and where the others go. Returns data (MergePlan); the core
/// checks the plan and applies it. One object serves one model and is used from several threads at once:
/// every method is const and must not keep mutable state.
///
/// A result must not depend on the other images of the batch, and ties go to the lowest index. Shapes
/// depend on the schedule alone.
///
///   class KeepFirst final : public TokenMerger {           // drops the last r tokens
///     MergePlan plan(const MergeInputs& in, const Schedule& s) const override {
///       const auto n = in.tokens.size(1) - s.remove[in.block];
///       auto keep = at::arange(n, at::kLong).expand({in.tokens.size(0), n});
///       auto none = at::empty({in.tokens.size(0), 0}, at::kLong);
///       return {.keep = keep, .src = none, .dst = none};
///     }
///   };
class TokenMerger {
 public:
  virtual ~TokenMerger();

  /// What plan() reads besides tokens and sizes; nothing by default.
  [[nodiscard]] virtual Needs needs() const { return {}; }

  /// The schedule as this merger will run it on `shape`: `remove` cut to (N - protected) / 2 per block by
  /// default. Of a schedule that it has resolved, that schedule: a model file keeps the resolved one, which is resolved
  /// again. Throws Error(usage) where the schedule makes no sense for it.
  [[nodiscard]] virtual Schedule resolve(const Schedule& schedule, const ModelShape& shape) const;

  /// Tokens that leave each block under a resolved schedule, `depth` long; by default N minus `remove`.
  [[nodiscard]] virtual std::vector<int64_t> tokens_after(const Schedule& schedule, const ModelShape& shape) const;

  /// The merger's trained tensors under a resolved schedule; none by default.
  [[nodiscard]] virtual std::vector<TensorDecl> declare(const ModelShape& shape, const Schedule& schedule) const;

  /// Whether a block calls plan(): by default where tokens leave it, and always there. DiffRate sorts its tokens in
  /// every block.
  [[nodiscard]] virtual bool acts(int64_t tokens_in, int64_t tokens_out) const { return tokens_in != tokens_out; }

  /// The plan of a block as a recipe the core knows, where acts(); none by default. A merger that gives one needs no
  /// plan(), and runs on a GPU by the core's fused kernels.
  [[nodiscard]] virtual std::optional<PlanRecipe> recipe(int64_t block, const Schedule& schedule,
                                                         const TensorMap& learned) const;

  /// The plan of block `in.block`, from CPU tensors; called only where acts(). By default what recipe() says. On a GPU
  /// a merger without a recipe is asked here too, from inside the graph: the inputs are copied to the host and the plan
  /// back, which costs more than a small merge saves.
  [[nodiscard]] virtual MergePlan plan(const MergeInputs& in, const Schedule& schedule) const;

  /// Whether sizes of an image sum to N after every block (true for merging, false where tokens are dropped).
  [[nodiscard]] virtual bool conserves_size() const { return true; }

 protected:
  TokenMerger() = default;
  TokenMerger(const TokenMerger&) = delete;
  TokenMerger& operator=(const TokenMerger&) = delete;
};

/// The rest of a schedule that removes tokens, cut block by block to what a bipartite merge can take:
/// min(r, (N - protected) / 2), floor (ToMe). Throws Error(usage) when it is not `depth` long or negative.
[[nodiscard]] Schedule cut_to_half(const Schedule& schedule, const ModelShape& shape);

}  // namespace pyra::sdk
