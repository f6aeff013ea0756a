// What a Vit keeps beside its named tensors: the same tensors by the place where forward needs them.
#pragma once
#include <array>

#include "kernels/merge.h"
#include "nn/vit.h"

namespace pyra::nn {

struct Norm {
  at::Tensor weight, bias;  ///< [C]
};

struct BlockParts {
  Norm norm1, norm2;
  /// qkv, proj, fc1, fc2, at the index of their sdk::LinearKind.
  std::array<kernels::LinearWeights, 4> layers;
};

struct Vit::Parts {
  kernels::LinearWeights patch_embed;  ///< [C, 3 P P]
  at::Tensor prefix;                   ///< [1,protected,C] tokens before the patches, positions added
  at::Tensor patch_positions;          ///< [1,patches,C]
  std::vector<BlockParts> blocks;
  Norm norm;
  std::vector<kernels::LinearWeights> heads;  ///< head, and head_dist of a distilled model

  template <class F>
  void for_each_layer(F&& f) {
    f(patch_embed);
    for (BlockParts& block : blocks)
      for (kernels::LinearWeights& layer : block.layers) f(layer);
    for (kernels::LinearWeights& head : heads) f(head);
  }
};

/// What is random in a training step, as functions of (seed, step): on the CPU and on a GPU the same.
/// Domains of one step's random numbers: a step has room for 4 linear layers in each of kMaxDepth blocks.
inline constexpr uint64_t kSitesPerStep = 4 * uint64_t(kMaxDepth);
[[nodiscard]] inline uint64_t dropout_site(int64_t block, sdk::LinearKind kind) {
  return uint64_t(4 * block + int64_t(kind));
}
/// Stochastic depth's rate in a block: from 0 to `last`, linearly.
[[nodiscard]] inline double drop_path_rate(double last, int64_t block, int64_t depth) {
  return depth > 1 ? last * double(block) / double(depth - 1) : 0.0;
}
/// 0 or 1/(1-p) for each image of a branch (0: attention, 1: MLP) of a block.
void fill_branch_scale(double p, const StepRandom& random, int64_t block, int64_t branch, float* scale, int64_t batch);

/// A merger's plan as the merge kernels take it, tensors shared; not checked.
[[nodiscard]] kernels::MergeArguments arguments_of(const sdk::MergePlan& plan);

/// The linear layers of a model in forward order; for PEFT methods and for merging them.
[[nodiscard]] std::vector<sdk::LinearSite> linear_sites(const VitConfig& config);

}  // namespace pyra::nn
