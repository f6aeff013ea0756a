// A merge plugin of one's own: ToMe, but how much a token counts when it is merged away is learned, one number a block.
//
// ToMe averages a token into its partner by the number of patches each stands for. Late tokens are summaries and early
// ones nearly duplicates; a factor on the leaving token's weight lets training decide how far the partner may be moved:
//   factor = limit * sigmoid(theta),  theta = 0 at the start, so with limit = 2 an untrained model is ToMe exactly.
#include <ATen/ATen.h>

#include "base/text.h"
#include "sdk/bipartite.h"
#include "sdk/plugin.h"

namespace {

using namespace pyra::sdk;

std::string theta_name(int64_t block) {
  return pyra::cat("blocks.", block, ".theta");
}

class Weighted final : public TokenMerger {
 public:
  static std::vector<Parameter> parameters() {
    return {{.name = "limit",
             .default_value = 2.0,
             .help = "the largest factor on a merged token's weight; with 2 an untrained model is ToMe",
             .minimum = 0.1,
             .maximum = 16.0}};
  }

  explicit Weighted(const Parameters& parameters) : limit_(parameters.number("limit")) {}

  [[nodiscard]] Needs needs() const override { return {.key_mean = true}; }

  [[nodiscard]] std::vector<TensorDecl> declare(const ModelShape& shape, const Schedule& schedule) const override {
    std::vector<TensorDecl> tensors;
    for (int64_t block = 0; block < shape.depth; ++block) {
      if (schedule.remove[size_t(block)] > 0) tensors.push_back({.name = theta_name(block), .shape = {1}});
    }
    return tensors;
  }

  [[nodiscard]] MergePlan plan(const MergeInputs& in, const Schedule& schedule) const override {
    const int64_t r = schedule.remove[size_t(in.block)];
    MergePlan plan = bipartite_plan(in.key_mean, r, in.protected_tokens, Partition{});
    const at::Tensor factor = limit_ * at::sigmoid(in.learned.at(theta_name(in.block)));
    plan.src_weight = factor.expand({in.tokens.size(0), r});
    return plan;
  }

 private:
  double limit_;
};

}  // namespace

PYRA_MERGE_PLUGIN(Weighted, "weighted", "1.0", "ToMe with a learned weight, one a block, on the tokens merged away")
