// Models with timm's tensor names and no word from us in the metadata: what their shapes tell.
#pragma once
#include <optional>

#include "io/model_file.h"
#include "io/safetensors.h"

namespace pyra::io {

/// Config, preprocessing, class names and provenance from names, shapes and metadata (architecture, mean, std,
/// num_heads, class_names where they stand there). `prefix` stands before every name ("module.").
/// A file without a head has num_classes 0. Error(input) names the tensor that is missing or unknown here.
[[nodiscard]] ModelFile describe_timm_model(const SafetensorsFile& file, const std::string& prefix,
                                            const ReadModelOptions& options);

/// "module." and "_orig_mod." where all names open so: training wrappers of PyTorch leave them behind. Else "".
[[nodiscard]] std::string wrapper_prefix(const SafetensorsFile& file);

/// Whether a timm file's tensor is of no use here and may be left out: MAE's decoder, pre_logits.
[[nodiscard]] bool droppable(std::string_view name);

/// Why a ViT with such a tensor is not read: "layer scale"; "" when the name says nothing.
[[nodiscard]] std::string unsupported_part(std::string_view name);

/// The metadata entries that describe_timm_model reads.
[[nodiscard]] Metadata timm_metadata(const ModelFile& model);

}  // namespace pyra::io
