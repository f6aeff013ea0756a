// Which patches of an image stand together in one token, after every block that merges.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "nn/vit.h"

namespace pyra::tasks {

inline constexpr int64_t kDropped = -1;

/// One image after one block.
struct TokenGroups {
  int64_t block = 0;
  int64_t tokens = 0;               ///< that leave the block, protected ones included
  std::vector<int64_t> token_of{};  ///< [patches], row by row: the position of the token a patch is in, or kDropped
};

struct TokenTrace {
  at::Tensor logits;                             ///< [B,classes] fp32
  std::vector<std::vector<TokenGroups>> images;  ///< B long; an entry for each block in which the merger acts
};

/// Runs `images` [B,3,S,S] fp32, normalised, by the reference path on the CPU in fp32, and follows every patch through
/// the merge plans. Another device or precision may tip the choice between two nearly equal tokens.
[[nodiscard]] TokenTrace trace_tokens(const nn::Vit& model, const at::Tensor& images);

}  // namespace pyra::tasks
