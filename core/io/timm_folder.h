// A folder as timm's models lie on the Hugging Face hub: config.json (architecture, pretrained_cfg) beside
// model.safetensors with timm's names. The config says what the tensors cannot: mean, deviation, heads, class names.
#pragma once
#include <filesystem>

#include "io/model_file.h"

namespace pyra::io {

/// Whether a folder's config.json names an architecture of timm. Error(input) where it is no JSON.
[[nodiscard]] bool is_timm_folder(const std::filesystem::path& folder);

/// Error(input) naming file and key or tensor. A bilinear filter is not kept, nor crop_pct: images are prepared as
/// everywhere (nn::Preprocess), unless a recipe says otherwise.
[[nodiscard]] ModelFile read_timm_folder(const std::filesystem::path& folder, const ReadModelOptions& options);

}  // namespace pyra::io
