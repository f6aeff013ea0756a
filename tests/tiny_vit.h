// The architecture that tests of training share: milliseconds a step.
#pragma once
#include "nn/config.h"
#include "nn/preprocess.h"

namespace pyra::test {

inline constexpr int64_t kTinyClasses = 3;
inline const nn::Preprocess kTinyPreprocess{.size = 16};

/// 16 px in patches of 4: 17 tokens, 18 of a distilled model.
[[nodiscard]] inline nn::VitConfig tiny_config(int64_t depth = 2, bool distilled = false) {
  return {.arch = "tiny",
          .image_size = 16,
          .patch_size = 4,
          .embed_dim = 32,
          .depth = depth,
          .num_heads = 2,
          .mlp_dim = 64,
          .num_classes = kTinyClasses,
          .distilled = distilled};
}

}  // namespace pyra::test
