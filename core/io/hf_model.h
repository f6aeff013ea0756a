// Hugging Face transformers' ViT and DeiT folders: config.json, preprocessor_config.json and model.safetensors, whole
// or in shards. Both spellings of their tensor names are read (transformers below 5, which files on disk keep, and from
// 5 on); the one on disk is written.
#pragma once
#include <filesystem>

#include "io/model_file.h"

namespace pyra::io {

inline constexpr const char* kHfWeights = "model.safetensors";
inline constexpr size_t kMaxHubJson = size_t{16} << 20;  ///< bytes of a config

/// Whether a folder holds a config.json (which may be timm's, see timm_folder.h).
[[nodiscard]] bool is_hf_folder(const std::filesystem::path& folder);

/// ViT with a class token's classifier or none, and DeiT with both its classifiers. q, k and v become timm's fused qkv.
/// Error(input) naming file and key or tensor: another kind of model, an activation other than exact GELU, a tensor
/// that is missing, unknown or of another shape, an index that names a file outside the folder. A processor's bilinear
/// filter is not kept: images are resized by bicubic here.
[[nodiscard]] ModelFile read_hf_model(const std::filesystem::path& folder);

/// A new folder (its parent must be there, it must not) with the three files. Error(usage) for what their format cannot
/// say: a merge, average pooling.
void write_hf_model(const std::filesystem::path& folder, const ModelFile& model);

}  // namespace pyra::io
