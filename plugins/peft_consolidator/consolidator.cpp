// Consolidator (arXiv 2305.00603): beside a frozen linear layer a grouped one on channel-shuffled input,
//   y += G shuffle(x) + c,
// G block-diagonal in `groups` blocks [out/g, in/g], zero at the start as is c. The shuffle reads the input as a matrix
// [g, in/g] and transposes it, so that every group sees channels of every part. All of it is linear: merged, it is a
// sparse matrix added to the weight and a vector added to the bias.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>

#include "base/error.h"
#include "sdk/linear_site.h"
#include "sdk/plugin.h"

namespace {

using namespace pyra::sdk;

constexpr int64_t kMostGroups = 64;
constexpr const char *kWeight = ".consolidator.weight", *kBias = ".consolidator.bias";

struct Layer {
  LinearKind kind;
  const char* target;
};
constexpr Layer kLayers[] = {
    {LinearKind::qkv, "qkv"}, {LinearKind::proj, "proj"}, {LinearKind::fc1, "fc1"}, {LinearKind::fc2, "fc2"}};

class Consolidator final : public PeftMethod {
 public:
  static std::vector<Parameter> parameters() {
    return {{.name = "groups",
             .default_value = int64_t{0},
             .help = "blocks of the grouped layer, a divisor of its inputs and outputs; 0: the largest power of two up "
                     "to 64 that is",
             .minimum = 0,
             .maximum = 4096},
            {.name = "targets",
             .default_value = std::vector<std::string>{"qkv", "proj", "fc1", "fc2"},
             .help = "layers that get a grouped one beside them",
             .choices = {"qkv", "proj", "fc1", "fc2"}}};
  }

  explicit Consolidator(const Parameters& parameters) : groups_(parameters.integer("groups")) {
    const auto& targets = parameters.list("targets");
    if (targets.empty())
      pyra::fail(pyra::ExitCode::usage, "consolidator: targets is empty; expected at least one of qkv, proj, fc1, fc2");
    for (size_t i = 0; i < std::size(kLayers); ++i)
      targeted_[i] = std::find(targets.begin(), targets.end(), kLayers[i].target) != targets.end();
  }

  [[nodiscard]] std::vector<TensorDecl> declare(const ModelShape& shape) const override {
    std::vector<TensorDecl> tensors;
    for (int64_t block = 0; block < shape.depth; ++block) {
      for (size_t i = 0; i < std::size(kLayers); ++i) {
        if (!targeted_[i]) continue;
        const LinearSite site = linear_site(shape, block, kLayers[i].kind);
        const int64_t groups = groups_of(site);
        tensors.push_back({.name = site.name() + kWeight,
                           .shape = {groups, site.out / groups, site.in / groups},
                           .init = Init::zeros});
        tensors.push_back({.name = site.name() + kBias, .shape = {site.out}, .init = Init::zeros});
      }
    }
    return tensors;
  }

  [[nodiscard]] bool adapts(const LinearSite& site) const override { return targeted_[size_t(site.kind)]; }

  [[nodiscard]] at::Tensor adapt(const LinearSite& site, const at::Tensor& x, const at::Tensor& y,
                                 const TensorMap& learned) const override {
    const at::Tensor weight = learned.at(site.name() + kWeight).to(x.scalar_type());
    const at::Tensor bias = learned.at(site.name() + kBias).to(x.scalar_type());
    const int64_t rows = x.size(0), groups = weight.size(0);
    // [rows, in] as [groups, rows, in/groups], shuffled; times [groups, in/groups, out/groups].
    const at::Tensor input = shuffled(x, groups).view({rows, groups, -1}).transpose(0, 1);
    return y + at::bmm(input, weight.transpose(1, 2)).transpose(0, 1).reshape({rows, site.out}) + bias;
  }

  [[nodiscard]] bool mergeable() const override { return true; }

  [[nodiscard]] LinearDelta delta(const LinearSite& site, const TensorMap& learned) const override {
    if (!adapts(site)) return {};
    const at::Tensor weight = learned.at(site.name() + kWeight).detach();
    at::Tensor blocks = at::zeros({site.out, site.in}, at::kFloat);
    for (int64_t g = 0; g < weight.size(0); ++g)
      blocks.narrow(0, g * weight.size(1), weight.size(1))
          .narrow(1, g * weight.size(2), weight.size(2))
          .copy_(weight[g]);
    // Column p of the blocks reads channel source[p] of the input.
    const at::Tensor source = shuffled(at::arange(site.in, at::kLong).unsqueeze(0), weight.size(0)).squeeze(0);
    at::Tensor dense = at::zeros_like(blocks);
    dense.index_copy_(1, source, blocks);
    return {.weight = dense, .bias = learned.at(site.name() + kBias).detach().clone()};
  }

 private:
  [[nodiscard]] static at::Tensor shuffled(const at::Tensor& x, int64_t groups) {
    return x.reshape({x.size(0), groups, -1}).transpose(1, 2).reshape(x.sizes());
  }

  [[nodiscard]] int64_t groups_of(const LinearSite& site) const {
    const auto divides = [&](int64_t groups) { return site.in % groups == 0 && site.out % groups == 0; };
    if (groups_ == 0) {
      int64_t groups = kMostGroups;
      while (!divides(groups)) groups /= 2;
      return groups;
    }
    if (!divides(groups_))
      pyra::fail(pyra::ExitCode::usage, "consolidator: groups = ", groups_, " does not divide the ", site.in,
                 " inputs and ", site.out, " outputs of ", site.name(), "; set peft.groups to a number that does");
    return groups_;
  }

  int64_t groups_;
  std::array<bool, std::size(kLayers)> targeted_{};  // by LinearKind
};

}  // namespace

PYRA_PEFT_PLUGIN(Consolidator, "consolidator", "1.0",
                 "Grouped linear layers on shuffled channels beside frozen ones (Consolidator, arXiv 2305.00603)")
