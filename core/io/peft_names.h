// What the layers of a ViT are called in a PEFT adapter: by timm, or by transformers of either spelling.
#pragma once
#include <string>
#include <vector>

#include "nn/config.h"

namespace pyra::io {

enum class PeftNames {
  timm,  ///< blocks.3.attn.qkv
  hf,    ///< vit.layers.3.attention.q_proj, k_proj, v_proj: transformers from version 5 on
  hf4,   ///< vit.encoder.layer.3.attention.attention.query, key, value: transformers below 5
};

struct PeftNaming {
  PeftNames names = PeftNames::timm;
  std::string model{};  ///< "vit" or "deit"; transformers only
  bool bare = false;    ///< without it before the names: an adapter of the model without a classifier
};

/// The tensors that make up ours, "blocks.3.attn.qkv.weight": one, or those of query, key and value in this order.
/// Average-pooled models have timm's names only.
[[nodiscard]] std::vector<std::string> peft_names(const std::string& tensor, const PeftNaming& naming, bool distilled);

/// All namings that an adapter for such a model may have.
[[nodiscard]] std::vector<PeftNaming> peft_namings(const nn::VitConfig& config);

/// "timm", "transformers 5", "transformers 4": for messages.
[[nodiscard]] const char* library_of(PeftNames names);

}  // namespace pyra::io
