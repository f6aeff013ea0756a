// Looks over a merger's shoulder: which plan it made in each block of a forward pass.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "nn/vit.h"

namespace pyra::tasks {

/// Plans of one forward pass on the CPU by block; blocks whose merger does not act have none.
using Plans = std::map<int64_t, sdk::MergePlan>;

/// Stands before a merger and remembers its plans, or makes it follow remembered ones.
class PlanRecorder final : public sdk::TokenMerger {
 public:
  /// Writes into `plans` where `moved` is null. Else it follows them, but for the gate, whose tensors are the merger's
  /// own, and counts in `moved` the blocks in which the merger would have chosen otherwise.
  PlanRecorder(std::shared_ptr<const sdk::TokenMerger> merger, Plans& plans, int64_t* moved)
      : merger_(std::move(merger)), plans_(plans), moved_(moved) {}

  sdk::Needs needs() const override { return merger_->needs(); }
  sdk::Schedule resolve(const sdk::Schedule& schedule, const sdk::ModelShape& shape) const override;
  std::vector<int64_t> tokens_after(const sdk::Schedule& schedule, const sdk::ModelShape& shape) const override;
  std::vector<sdk::TensorDecl> declare(const sdk::ModelShape& shape, const sdk::Schedule& schedule) const override;
  bool acts(int64_t tokens_in, int64_t tokens_out) const override { return merger_->acts(tokens_in, tokens_out); }
  bool conserves_size() const override { return merger_->conserves_size(); }
  sdk::MergePlan plan(const sdk::MergeInputs& in, const sdk::Schedule& schedule) const override;

 private:
  std::shared_ptr<const sdk::TokenMerger> merger_;
  Plans& plans_;
  int64_t* moved_;
};

/// A model that shares everything with `model` but looks through a PlanRecorder; it keeps references to `plans` and
/// `moved`. For one thread's forward passes on the CPU.
[[nodiscard]] nn::Vit observed(const nn::Vit& model, Plans& plans, int64_t* moved = nullptr);

}  // namespace pyra::tasks
