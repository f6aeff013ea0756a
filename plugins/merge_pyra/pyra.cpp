// PYRA (arXiv 2403.09192): ToMe's merging, with the tokens that leave scaled by a trained gate of rank one before
// they are added. b starts at zero, and then the gate does nothing: an untrained PYRA is ToMe exactly.
#include "base/text.h"
#include "sdk/bipartite.h"
#include "sdk/plugin.h"

namespace {

using namespace pyra::sdk;

std::string tensor_name(int64_t block, std::string_view tensor) {
  return pyra::cat("blocks.", block, ".", tensor);
}

class Pyra final : public TokenMerger {
 public:
  static std::vector<Parameter> parameters() {
    std::vector<Parameter> all = partition_parameters();
    all.push_back({.name = "init",
                   .default_value = std::string("kaiming"),
                   .help = "initial values of a: uniform in [-1, 1] (kaiming, the authors' program) or standard "
                           "normal (gaussian, the article)",
                   .choices = {"kaiming", "gaussian"}});
    all.push_back({.name = "norm_eps",
                   .default_value = 1e-5,
                   .help = "epsilon of the gate's LayerNorm",
                   .minimum = 1e-12,
                   .maximum = 1.0});
    return all;
  }

  explicit Pyra(const Parameters& parameters)
      : partition_(partition_from(parameters)),
        init_(parameters.string("init") == "gaussian" ? Init::gaussian : Init::kaiming_uniform),
        norm_eps_(parameters.number("norm_eps")) {}

  [[nodiscard]] Needs needs() const override { return {.key_mean = true}; }

  [[nodiscard]] std::vector<TensorDecl> declare(const ModelShape& shape, const Schedule& schedule) const override {
    std::vector<TensorDecl> tensors;
    const int64_t width = shape.embed_dim;
    for (int64_t block = 0; block < shape.depth; ++block) {
      const int64_t r = schedule.remove[size_t(block)];
      if (r == 0) continue;
      tensors.push_back({.name = tensor_name(block, "a"), .shape = {r, 1}, .init = init_, .fan_in = 1});
      tensors.push_back({.name = tensor_name(block, "b"), .shape = {1, width}, .init = Init::zeros});
      tensors.push_back({.name = tensor_name(block, "norm.weight"), .shape = {width}, .init = Init::ones});
      tensors.push_back({.name = tensor_name(block, "norm.bias"), .shape = {width}, .init = Init::zeros});
    }
    return tensors;
  }

  [[nodiscard]] MergePlan plan(const MergeInputs& in, const Schedule& schedule) const override {
    MergePlan plan = bipartite_plan(in.key_mean, schedule.remove[size_t(in.block)], in.protected_tokens, partition_);
    plan.gate = Gate{.a = in.learned.at(tensor_name(in.block, "a")),
                     .b = in.learned.at(tensor_name(in.block, "b")),
                     .weight = in.learned.at(tensor_name(in.block, "norm.weight")),
                     .bias = in.learned.at(tensor_name(in.block, "norm.bias")),
                     .eps = norm_eps_};
    return plan;
  }

 private:
  Partition partition_;
  Init init_;
  double norm_eps_;
};

}  // namespace

PYRA_MERGE_PLUGIN(Pyra, "pyra", "1.0",
                  "ToMe with a trained rank-one gate on the merged tokens (PYRA, arXiv 2403.09192)")
