// Models with timm's tensor names and no word from us in the metadata: what their shapes tell.
#pragma once
#include <array>
#include <optional>

#include "io/model_file.h"
#include "io/named_tensors.h"

namespace pyra::io {

/// ImageNet's statistics, with which DeiT and MAE were trained, and PYRA's authors trained theirs.
inline constexpr std::array<float, 3> kImageNetMean{0.485f, 0.456f, 0.406f}, kImageNetStd{0.229f, 0.224f, 0.225f};

/// Config, preprocessing, class names and provenance from names, shapes and metadata (architecture, mean, std,
/// num_heads, class_names where they stand there). `prefix` stands before every name ("module.").
/// A file without a head has num_classes 0. Error(input) names the tensor that is missing or unknown here.
[[nodiscard]] ModelFile describe_timm_model(const NamedTensors& named, const std::string& prefix,
                                            const ReadModelOptions& options);

/// Whether models so called were trained with ImageNet's mean and deviation (DeiT, MAE, DINOv2), not with 0.5.
[[nodiscard]] bool has_imagenet_statistics(std::string_view arch);

/// nn::arch_config of what a file says of itself, which may be any text: nothing for a name that is not known.
[[nodiscard]] std::optional<nn::VitConfig> named_arch(const std::string& name);

/// "module." and "_orig_mod." where all names open so: training wrappers of PyTorch leave them behind. Else "".
[[nodiscard]] std::string wrapper_prefix(const NamedTensors& named);

/// Whether a timm file's tensor is of no use here and may be left out: MAE's decoder, pre_logits.
[[nodiscard]] bool droppable(std::string_view name);

/// LayerScale's tensors, by timm's name ("blocks.0.ls1.gamma") or DeiT-III's own ("blocks.0.gamma_1").
[[nodiscard]] bool is_layer_scale(std::string_view name);
/// Reads them and multiplies them into attn.proj and mlp.fc2 (VitConfig::layer_scale). Error(input) where one is
/// missing or of another shape.
void fold_layer_scale(const NamedTensors& named, const std::string& prefix, ModelFile& model);
/// Scales of one: what a timm file of such a model needs beside its folded layers.
[[nodiscard]] sdk::TensorMap unit_layer_scale(const nn::VitConfig& config);

/// Why a ViT with such a tensor is not read: "normalised keys"; "" when the name says nothing.
[[nodiscard]] std::string unsupported_part(std::string_view name);

/// The metadata entries that describe_timm_model reads.
[[nodiscard]] Metadata timm_metadata(const ModelFile& model);

}  // namespace pyra::io
