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

  [[nodiscard]] std::optional<PlanRecipe> recipe(int64_t block, const Schedule& schedule,
                                                 const TensorMap& learned) const override {
    const auto tensor = [&](std::string_view name) { return learned.at(tensor_name(block, name)); };
    return PlanRecipe{.remove = schedule.remove[size_t(block)],
                      .partition = partition_,
                      .gate = Gate{.a = tensor("a"),
                                   .b = tensor("b"),
                                   .weight = tensor("norm.weight"),
                                   .bias = tensor("norm.bias"),
                                   .eps = norm_eps_}};
  }

 private:
  Partition partition_;
  Init init_;
  double norm_eps_;
};

}  // namespace

PYRA_MERGE_PLUGIN(Pyra, "pyra", "1.0",
                  "ToMe with a trained rank-one gate on the merged tokens (PYRA, arXiv 2403.09192)")
