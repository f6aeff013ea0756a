// LoRA adapters that Hugging Face peft wrote for a ViT of timm or transformers: from a folder to terms of our layers.
#pragma once
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "io/model_file.h"
#include "io/peft_config.h"
#include "io/peft_names.h"
#include "io/safetensors.h"

namespace pyra::io {

/// The term of one module, rows part/parts of one of our layers: W += scale B A. All fp32.
struct PeftTerm {
  std::string module;  ///< as the adapter calls it
  at::Tensor a;        ///< [rank,in]; a convolution's kernel flattened
  at::Tensor b;        ///< [out,rank]
  double scale = 1;
  int64_t part = 0, parts = 1;  ///< q, k and v are parts 0, 1 and 2 of the fused qkv
};

struct PeftAdapter {
  PeftConfig config;
  PeftNaming naming;
  std::map<std::string, std::vector<PeftTerm>> terms;  ///< by our layer: "blocks.3.attn.qkv", "patch_embed.proj"
  /// The base model's tensors, those in their place that the adapter holds whole (modules_to_save, biases), and what
  /// lora_bias adds. Terms are not added yet. Tensors that are the base's share its storage.
  sdk::TensorMap weights;
  int64_t num_classes = 0;  ///< of the head in `weights`
  bool brings_head = false;
  Metadata metadata;  ///< of the adapter's tensor file
};

/// Whether a folder holds an adapter_config.json.
[[nodiscard]] bool is_peft_folder(const std::filesystem::path& folder);

/// Error(input) that says what is missing in a folder that read_peft_adapter cannot read: no config, no tensors, or
/// only a legacy adapter_model.bin; an adapter in a folder below is named.
void check_peft_folder(const std::filesystem::path& folder);

/// Reads the adapter for `base`. Its head may have another number of classes than the base's. Error(input) names file
/// and tensor or key: what read_peft_config refuses, tensors for layers that the base does not have or of another
/// shape, values that are not finite, a term that the config does not name or one that it names and is not there, a
/// head that neither has, a legacy adapter_model.bin.
[[nodiscard]] PeftAdapter read_peft_adapter(const std::filesystem::path& folder, const ModelFile& base);

}  // namespace pyra::io
