// A small model and images for it, for tests of the whole engine on a GPU.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "goldens.h"
#include "kernels/tensors.h"
#include "nn/vit.h"

namespace pyra::test {

[[nodiscard]] inline sdk::Schedule removing(const std::vector<int64_t>& counts) {
  sdk::Schedule schedule;
  schedule.text = "test";
  schedule.remove = counts;
  return schedule;
}

inline void attach(nn::Vit& vit, std::shared_ptr<const sdk::TokenMerger> merger, const std::string& name,
                   const sdk::Schedule& schedule, bool proportional = true) {
  auto setup = std::make_unique<nn::MergeSetup>();
  setup->name = name;
  setup->merger = std::move(merger);
  setup->schedule = setup->merger->resolve(schedule, vit.config().shape());
  for (const sdk::TensorDecl& decl : setup->merger->declare(vit.config().shape(), setup->schedule))
    setup->learned.emplace(decl.name, nn::make_tensor(decl, 5) + 0.1 * nn::make_tensor(decl, 6));
  setup->proportional_attention = proportional;
  vit.set_merge(std::move(setup));
}

inline void attach(nn::Vit& vit, const std::string& name, const sdk::Schedule& schedule, bool proportional = true) {
  attach(vit, built_plugins().merger(name, {}, "test"), name, schedule, proportional);
}

/// 37 tokens of 64 channels, 4 heads: every kernel's edges, no round numbers.
[[nodiscard]] inline nn::VitConfig small_config(int64_t depth = 3) {
  return {.arch = "small",
          .image_size = 48,
          .patch_size = 8,
          .embed_dim = 64,
          .depth = depth,
          .num_heads = 4,
          .mlp_dim = 160,
          .num_classes = 7};
}

/// uint8 images.
[[nodiscard]] inline at::Tensor bytes(const nn::VitConfig& config, int64_t count, uint64_t seed = 3) {
  const at::Tensor values = seeded({count, config.image_size, config.image_size, 3}, seed, 60.0) + 128;
  return values.clamp(0, 255).to(at::kByte);
}

}  // namespace pyra::test
