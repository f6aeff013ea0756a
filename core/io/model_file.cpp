#include "io/model_file.h"

#include <cmath>

#include "base/error.h"
#include "io/hf_model.h"
#include "io/model_metadata.h"
#include "io/safetensors.h"
#include "io/timm_model.h"

namespace pyra::io {
namespace {

constexpr const char* kEntry = "pyra";
constexpr std::string_view kMergePrefix = "merge.";

/// All shapes are compared before the first tensor is read.
void check_shapes(const SafetensorsFile& file, const std::string& prefix,
                  const std::vector<nn::TensorShape>& expected) {
  for (const auto& [name, shape] : expected) {
    const auto found = file.entries().find(prefix + name);
    if (found == file.entries().end()) {
      fail(ExitCode::input, file.path().string(), ": has no tensor '", prefix, name, "', expected one of shape [",
           join(shape), "]");
    }
    if (found->second.shape != shape) {
      fail(ExitCode::input, file.path().string(), ": tensor '", prefix, name, "' has shape [",
           join(found->second.shape), "], expected [", join(shape), "]");
    }
  }
}

void read_weights(const SafetensorsFile& file, const std::string& prefix, ModelFile& model) {
  const std::vector<nn::TensorShape> expected = nn::tensor_shapes(model.config);
  check_shapes(file, prefix, expected);
  std::set<std::string, std::less<>> known;
  for (const auto& [name, shape] : expected) known.insert(prefix + name);
  const std::string merge = model.merge ? cat(kMergePrefix, model.merge->name, ".") : "";
  for (const auto& [name, entry] : file.entries()) {
    const bool learned = !merge.empty() && name.starts_with(merge);
    if (!learned && !known.contains(name) && !droppable(std::string_view(name).substr(prefix.size()))) {
      fail(ExitCode::input, file.path().string(), ": tensor '", printable(name), "' is none of this model's (depth ",
           model.config.depth, ", ", model.config.pool == nn::Pool::avg ? "average" : "token", " pooling",
           model.merge ? ", merge " + model.merge->name : "", ")");
    }
    if (learned) model.merge->learned.emplace(name.substr(merge.size()), read_fp32(file, name));
  }
  for (const auto& [name, shape] : expected) model.weights.emplace(name, read_fp32(file, prefix + name));
}

/// As timm's resample_abs_pos_embed: the grid by antialiased bicubic, class and distillation tokens as they are.
at::Tensor resized_positions(const at::Tensor& positions, int64_t prefix_tokens, int64_t old_side, int64_t new_side) {
  const int64_t dim = positions.size(2);
  const at::Tensor grid = positions.narrow(1, prefix_tokens, old_side * old_side)
                              .reshape({1, old_side, old_side, dim})
                              .permute({0, 3, 1, 2});
  const at::Tensor resized = at::_upsample_bicubic2d_aa(grid, {new_side, new_side}, /*align_corners=*/false);
  return at::cat({positions.narrow(1, 0, prefix_tokens), resized.permute({0, 2, 3, 1}).reshape({1, -1, dim})}, 1);
}

void change_image_size(ModelFile& model, int64_t image_size, const std::string& where) {
  nn::VitConfig config = model.config;
  config.image_size = image_size;
  nn::check_config(config, where);
  at::Tensor& positions = model.weights.at("pos_embed");
  positions = resized_positions(positions, config.protected_tokens(), model.config.image_size / config.patch_size,
                                image_size / config.patch_size);
  model.preprocess.shorter =
      std::llround(double(model.preprocess.shorter) * double(image_size) / double(model.config.image_size));
  model.preprocess.size = image_size;
  model.config = std::move(config);
}

void check_model(const ModelFile& model, const std::string& where) {
  nn::check_config(model.config, where);
  for (const auto& [name, shape] : nn::tensor_shapes(model.config)) {
    const auto found = model.weights.find(name);
    if (found == model.weights.end() || found->second.sizes() != at::IntArrayRef(shape)) {
      fail(ExitCode::internal, where, ": tensor '", name, "' is missing or not of shape [", join(shape), "]");
    }
  }
  if (!model.class_names.empty() && int64_t(model.class_names.size()) != model.config.num_classes) {
    fail(ExitCode::internal, where, ": ", model.class_names.size(), " class names for ", model.config.num_classes,
         " classes");
  }
}

}  // namespace

namespace {

ModelFile read_file_model(const std::filesystem::path& path, const ReadModelOptions& options) {
  const SafetensorsFile file(path);
  const auto entry = file.metadata().find(kEntry);
  const bool ours = entry != file.metadata().end();
  const std::string prefix = ours ? "" : wrapper_prefix(file);
  ModelFile model = ours ? parse_model_metadata(entry->second, cat(path.string(), ": metadata '", kEntry, "'"))
                         : describe_timm_model(file, prefix, options);
  read_weights(file, prefix, model);
  return model;
}

}  // namespace

ModelFile read_model(const std::filesystem::path& path, const ReadModelOptions& options) {
  ModelFile model = is_hf_folder(path) ? read_hf_model(path) : read_file_model(path, options);
  if (options.image_size && *options.image_size != model.config.image_size) {
    change_image_size(model, *options.image_size, path.string());
  }
  return model;
}

void write_model(const std::filesystem::path& path, const ModelFile& model, ModelFormat format) {
  if (format == ModelFormat::hf) {
    check_model(model, path.string());
    return write_hf_model(path, model);
  }
  if (format == ModelFormat::timm && model.merge) {
    fail(ExitCode::usage, path.string(), ": a timm file cannot carry the merge '", model.merge->name,
         "'; use --format pyra, or --drop-merge to write the dense model");
  }
  check_model(model, path.string());
  sdk::TensorMap tensors;
  for (const auto& [name, tensor] : model.weights) tensors.emplace(name, tensor.to(at::kFloat));
  if (model.merge) {
    for (const auto& [name, tensor] : model.merge->learned) {
      tensors.emplace(cat(kMergePrefix, model.merge->name, ".", name), tensor.to(at::kFloat));
    }
  }
  write_safetensors(path, tensors,
                    format == ModelFormat::timm ? timm_metadata(model) : Metadata{{kEntry, model_metadata(model)}});
}

}  // namespace pyra::io
