// timm's tensor names in Hugging Face transformers' words.
#pragma once
#include <string>
#include <vector>

namespace pyra::io {

enum class HfSpelling {
  on_disk,  ///< vit.encoder.layer.0.attention.attention.query.weight
  modules,  ///< vit.layers.0.attention.q_proj.weight: transformers from version 5 on, in memory
};

/// The tensors that make up `name` ("blocks.3.attn.qkv.weight": query, key and value, to be stacked in this order), by
/// their full names; `model` is "vit" or "deit".
[[nodiscard]] std::vector<std::string> hf_names(const std::string& name, const std::string& model, bool distilled,
                                                HfSpelling spelling);

}  // namespace pyra::io
