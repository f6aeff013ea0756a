// Adapters in peft's layout: one that others trained at work in a model, and a run's LoRA written for others.
#pragma once
#include <filesystem>
#include <string>

#include "base/progress.h"
#include "io/peft_names.h"
#include "tasks/run_folder.h"

namespace pyra::tasks {

/// The model file `base` with the adapter folder's LoRA beside its layers: not merged, so that what merging gives can
/// be compared with it. Head, biases and class names are the adapter's where it has them; image size, normalisation and
/// merger are the base's. A term of the patch embedding or the head is added to the weights at once. Error(input) as
/// io::read_peft_adapter's, and for an adapter of ours that was trained on another base model.
[[nodiscard]] Model open_peft_adapter(const std::filesystem::path& folder, const std::filesystem::path& base,
                                      const host::PluginRegistry& plugins, Progress& progress = silent_progress(),
                                      const io::ReadModelOptions& options = {});

/// What a written adapter says of where it belongs.
struct PeftTarget {
  io::PeftNaming naming;
  std::filesystem::path base;  ///< base_model_name_or_path
};

/// A new folder (its parent must be there, it must not) with adapter_config.json and adapter_model.safetensors: the
/// low-rank terms of the model's PEFT method and its head, named for `target`. For transformers a term of the fused qkv
/// becomes one each for query, key and value, with the same A and their rows of B; a part whose rows are zero in every
/// block was no target and is left out. Error(usage) for a method that is not LoRA, by its name.
void write_peft_adapter(const std::filesystem::path& folder, const Model& model, const PeftTarget& target,
                        const AdapterInfo& info);

/// How the modules of the model at `base` are named in transformers: "deit" where its folder's config.json or its
/// distillation token say so, else "vit".
[[nodiscard]] std::string hf_model_type(const std::filesystem::path& base, const nn::VitConfig& config);

}  // namespace pyra::tasks
