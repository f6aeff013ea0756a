// What a Vit keeps beside its named tensors: the same tensors by the place where forward needs them.
#pragma once
#include <array>

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
  at::Tensor prefix;                   ///< [1,protected,C] class (and distillation) token with its position added
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

/// The linear layers of a model in forward order; for PEFT methods and for merging them.
[[nodiscard]] std::vector<sdk::LinearSite> linear_sites(const VitConfig& config);

}  // namespace pyra::nn
