#include "io/model_file.h"

#include <cmath>

#include "base/error.h"
#include "io/augreg_model.h"
#include "io/hf_model.h"
#include "io/model_metadata.h"
#include "io/npz.h"
#include "io/safetensors.h"
#include "io/timm_folder.h"
#include "io/timm_model.h"

namespace pyra::io {
namespace {

constexpr const char* kEntry = "pyra";
constexpr std::string_view kMergePrefix = "merge.";

/// All shapes are compared before the first tensor is read.
void check_shapes(const NamedTensors& named, const std::string& prefix, const std::vector<nn::TensorShape>& expected) {
  for (const auto& [name, shape] : expected) {
    const auto found = named.shapes.find(prefix + name);
    if (found == named.shapes.end()) {
      fail(ExitCode::input, named.where, ": has no tensor '", prefix, name, "', expected one of shape [", join(shape),
           "]");
    }
    if (found->second != shape) {
      fail(ExitCode::input, named.where, ": tensor '", prefix, name, "' has shape [", join(found->second),
           "], expected [", join(shape), "]");
    }
  }
}

void read_weights(const NamedTensors& named, const std::string& prefix, ModelFile& model, bool has_layer_scale) {
  const std::vector<nn::TensorShape> expected = nn::tensor_shapes(model.config);
  check_shapes(named, prefix, expected);
  std::set<std::string, std::less<>> known;
  for (const auto& [name, shape] : expected) known.insert(prefix + name);
  const std::string merge = model.merge ? cat(kMergePrefix, model.merge->name, ".") : "";
  for (const auto& [name, found] : named.shapes) {
    const bool learned = !merge.empty() && name.starts_with(merge);
    const std::string_view own = std::string_view(name).substr(std::min(prefix.size(), name.size()));
    const bool scale = has_layer_scale && is_layer_scale(own);
    if (!learned && !scale && !known.contains(name) && !droppable(own)) {
      fail(ExitCode::input, named.where, ": tensor '", printable(name), "' is none of this model's (depth ",
           model.config.depth, ", ", model.config.pool == nn::Pool::avg ? "average" : "token", " pooling",
           model.merge ? ", merge " + model.merge->name : "", ")");
    }
    if (learned) model.merge->learned.emplace(name.substr(merge.size()), named.fp32(name));
  }
  for (const auto& [name, shape] : expected) model.weights.emplace(name, named.fp32(prefix + name));
  if (has_layer_scale) fold_layer_scale(named, prefix, model);
}

/// As timm's resample_abs_pos_embed: the grid by antialiased bicubic, the tokens before it as they are.
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
  if (image_size % config.patch_size != 0 || image_size < config.patch_size)
    fail(ExitCode::usage, "preprocess.size is ", image_size, ", expected a multiple of ", config.patch_size,
         ", the size of a patch of ", where);
  config.image_size = image_size;
  nn::check_config(config, where);
  at::Tensor& positions = model.weights.at("pos_embed");
  const int64_t prefix = config.no_embed_class ? 0 : config.protected_tokens();
  positions =
      resized_positions(positions, prefix, model.config.image_size / config.patch_size, image_size / config.patch_size);
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

ModelFile read_file_model(const std::filesystem::path& path, const ReadModelOptions& options) {
  const SafetensorsFile file(path);
  const NamedTensors named = named_tensors(file);
  const auto entry = file.metadata().find(kEntry);
  if (entry == file.metadata().end()) return timm_model(named, options);
  ModelFile model = parse_model_metadata(entry->second, cat(path.string(), ": metadata '", kEntry, "'"));
  read_weights(named, "", model, false);  // LayerScale is folded in already
  return model;
}

}  // namespace

ModelFile timm_model(const NamedTensors& named, const ReadModelOptions& options) {
  const std::string prefix = wrapper_prefix(named);
  ModelFile model = describe_timm_model(named, prefix, options);
  read_weights(named, prefix, model, model.config.layer_scale);
  return model;
}

ModelFile read_model(const std::filesystem::path& path, const ReadModelOptions& options) {
  ModelFile model = is_timm_folder(path) ? read_timm_folder(path, options)
                    : is_hf_folder(path) ? read_hf_model(path)
                    : is_npz(path)       ? read_augreg_model(path, options)
                                         : read_file_model(path, options);
  if (options.image_size && *options.image_size != model.config.image_size) {
    change_image_size(model, *options.image_size, path.string());
  }
  return model;
}

void begin_provenance(ModelFile& model, const std::string& how, const std::filesystem::path& origin) {
  const std::filesystem::path plain = origin.has_filename() ? origin : origin.parent_path();  // "folder/"
  std::map<std::string, std::string> said{{how, plain.filename().string()}};
  for (auto& [key, value] : model.provenance)
    if (!key.starts_with("base_")) said.emplace("base_" + key, std::move(value));
  model.provenance = std::move(said);
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
  if (format == ModelFormat::timm && model.config.layer_scale) tensors.merge(unit_layer_scale(model.config));
  write_safetensors(path, tensors,
                    format == ModelFormat::timm ? timm_metadata(model) : Metadata{{kEntry, model_metadata(model)}});
}

}  // namespace pyra::io
