#include "io/hf_model.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "base/error.h"
#include "io/atomic_file.h"
#include "io/hf_names.h"
#include "io/json.h"
#include "io/json_fields.h"
#include "io/safetensors.h"

namespace pyra::io {
namespace fs = std::filesystem;
namespace {

constexpr size_t kMaxShards = 256;
constexpr int kBicubic = 3;  // Pillow's number
constexpr float kDefaultStatistic = 0.5f;

/// The tensors of all files of a folder, by name.
class Shards {
 public:
  explicit Shards(const fs::path& folder) : folder_(folder) {
    const fs::path index = folder / cat(kHfWeights, ".index.json");
    std::error_code error;
    if (fs::symlink_status(index, error).type() == fs::file_type::not_found) {  // a broken link is no missing index
      open(kHfWeights);
      return;
    }
    const nlohmann::json document = read_json(index, kMaxHubJson);
    const JsonFields map = JsonFields(document, index.string()).object("weight_map");
    std::set<std::string> files;
    for (const auto& [tensor, file] : map.whole().items()) {
      if (!file.is_string()) map.refuse(tensor, "is not the name of a file");
      files.insert(file.get<std::string>());
    }
    if (files.size() > kMaxShards)
      fail(ExitCode::input, index.string(), ": ", files.size(), " files, expected at most ", kMaxShards);
    for (const std::string& file : files) open(file);
    for (const auto& [tensor, file] : map.whole().items()) check_place(tensor, file.get<std::string>(), index);
  }

  [[nodiscard]] bool has(const std::string& name) const { return where_.contains(name); }
  [[nodiscard]] const SafetensorsFile& file_of(const std::string& name) const { return *where_.at(name); }
  [[nodiscard]] std::vector<std::string> names() const {
    std::vector<std::string> names;
    names.reserve(where_.size());
    for (const auto& [name, file] : where_) names.push_back(name);
    return names;
  }

 private:
  void open(const std::string& name) {
    const std::string shown = printable(name, name.size());
    if (name.empty() || name.find('/') != name.npos || name == "." || name == ".." || shown != name)
      fail(ExitCode::input, folder_.string(), ": the index names '", printable(name),
           "', expected files of this folder");
    files_.push_back(std::make_unique<SafetensorsFile>(folder_ / name));
    for (const auto& [tensor, entry] : files_.back()->entries()) {
      const auto [first, is_new] = where_.emplace(tensor, files_.back().get());
      if (!is_new)
        fail(ExitCode::input, files_.back()->path().string(), ": tensor '", printable(tensor), "' stands in ",
             first->second->path().filename().string(), " too");
    }
  }

  /// A file of another model, or of another version of this one, is told by what the index says of it.
  void check_place(const std::string& tensor, const std::string& file, const fs::path& index) const {
    const auto found = where_.find(tensor);
    if (found == where_.end() || found->second->path().filename() != file)
      fail(ExitCode::input, index.string(), ": names tensor '", printable(tensor), "' in ", file,
           found == where_.end() ? ", which does not hold it"
                                 : cat(", but it is in ", found->second->path().filename().string()));
  }

  fs::path folder_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, const SafetensorsFile*> where_;
};

/// One folder being read: what its config says, and how its tensors are spelt.
class HfReader {
 public:
  explicit HfReader(const fs::path& folder)
      : folder_(folder),
        config_path_((folder / "config.json").string()),
        document_(read_json(config_path_, kMaxHubJson)),
        config_(document_, config_path_),
        shards_(folder) {}

  [[nodiscard]] ModelFile read();

 private:
  void read_config(nn::VitConfig& config);
  void find_head(nn::VitConfig& config) const;
  void read_class_names(ModelFile& model) const;
  void read_processor(ModelFile& model) const;
  [[nodiscard]] at::Tensor read_tensor(const nn::TensorShape& wanted);
  [[nodiscard]] std::string on_file(const std::string& name) const;
  void check_left_over(const nn::VitConfig& config) const;

  fs::path folder_;
  std::string config_path_;
  nlohmann::json document_;
  JsonFields config_;
  Shards shards_;
  std::string model_ = "vit";
  bool bare_ = false;  ///< names lack the model's prefix: a file without a classifier
  bool query_bias_ = true;
  HfSpelling spelling_ = HfSpelling::on_disk;
  std::set<std::string> used_;
};

/// A name as this folder's files have it.
std::string HfReader::on_file(const std::string& name) const {
  const std::string prefix = model_ + ".";
  return bare_ && name.starts_with(prefix) ? name.substr(prefix.size()) : name;
}

void HfReader::read_config(nn::VitConfig& config) {
  model_ = config_.string("model_type");
  if (model_ != "vit" && model_ != "deit")
    config_.refuse("model_type", cat("is '", printable(model_), "', expected vit or deit"));
  const std::string activation = config_.has("hidden_act") ? config_.string("hidden_act") : "gelu";
  if (activation != "gelu") config_.refuse("hidden_act", cat("is '", printable(activation), "', expected gelu"));
  if (config_.has("num_channels") && config_.integer("num_channels") != 3)
    config_.refuse("num_channels", cat("is ", config_.integer("num_channels"), ", expected 3"));
  config.embed_dim = config_.integer("hidden_size");
  config.depth = config_.integer("num_hidden_layers");
  config.num_heads = config_.integer("num_attention_heads");
  config.mlp_dim = config_.integer("intermediate_size");
  config.image_size = config_.integer("image_size");
  config.patch_size = config_.integer("patch_size");
  config.norm_eps = config_.has("layer_norm_eps") ? config_.number("layer_norm_eps") : 1e-12;
  query_bias_ = !config_.has("qkv_bias") || config_.boolean("qkv_bias");
  bare_ = shards_.has("embeddings.cls_token");
  const std::string modules = on_file(model_ + ".layers.0.layernorm_before.weight");
  spelling_ = shards_.has(modules) ? HfSpelling::modules : HfSpelling::on_disk;
}

void HfReader::find_head(nn::VitConfig& config) const {
  config.distilled = shards_.has(on_file(model_ + ".embeddings.distillation_token"));
  const std::string name = hf_names("head.weight", model_, config.distilled, spelling_)[0];
  if (shards_.has(name)) {
    const auto& shape = shards_.file_of(name).entries().find(name)->second.shape;
    config.num_classes = shape.empty() ? 0 : shape[0];
    return;
  }
  config.num_classes = 0;
  if (config.distilled && shards_.has("classifier.weight"))
    fail(ExitCode::input, folder_.string(),
         ": a distilled DeiT with a classifier for the class token alone; expected "
         "cls_classifier and distillation_classifier (DeiTForImageClassificationWithTeacher)");
}

void HfReader::read_class_names(ModelFile& model) const {
  if (!config_.has("id2label") || model.config.num_classes == 0) return;
  const nlohmann::json& labels = config_.value("id2label");
  std::vector<std::string> names;
  for (int64_t i = 0; labels.is_object() && i < model.config.num_classes; ++i) {
    const auto found = labels.find(std::to_string(i));
    if (found == labels.end() || !found->is_string()) return;   // of another count: the classifier's shape decides
    if (found->get<std::string>() == cat("LABEL_", i)) return;  // what the library writes where there are none
    names.push_back(found->get<std::string>());
  }
  model.class_names = std::move(names);
}

/// {"height": 224, "width": 224}, {"shortest_edge": 256} or 224.
int64_t edge_of(const JsonFields& fields, const char* key) {
  const nlohmann::json& value = fields.value(key);
  if (!value.is_object()) return fields.integer(key);
  const JsonFields size = fields.object(key);
  for (const char* edge : {"shortest_edge", "height"})
    if (size.has(edge)) return size.integer(edge);
  fields.refuse(key, "has neither height nor shortest_edge");
}

void HfReader::read_processor(ModelFile& model) const {
  nn::Preprocess& preprocess = model.preprocess;
  preprocess.size = model.config.image_size;
  preprocess.mean.fill(kDefaultStatistic);
  preprocess.std.fill(kDefaultStatistic);
  const fs::path path = folder_ / "preprocessor_config.json";
  std::error_code error;
  if (fs::symlink_status(path, error).type() == fs::file_type::not_found) return;
  const nlohmann::json document = read_json(path, kMaxHubJson);
  const JsonFields fields(document, path.string());
  const auto channels = [&](const char* key, std::array<float, 3>& to) {
    if (!fields.has(key)) return;
    const std::vector<double> values = fields.numbers(key);
    if (values.size() != 3) fields.refuse(key, cat("has ", values.size(), " numbers, expected 3"));
    std::copy(values.begin(), values.end(), to.begin());
  };
  channels("image_mean", preprocess.mean);
  channels("image_std", preprocess.std);
  if (fields.has("do_normalize") && !fields.boolean("do_normalize")) {
    preprocess.mean.fill(0);
    preprocess.std.fill(1);
  }
  for (const float mean : preprocess.mean)
    if (!std::isfinite(mean)) fields.refuse("image_mean", "holds a number that is not finite");
  for (const float deviation : preprocess.std)
    if (!(deviation > 0 && std::isfinite(deviation)))
      fields.refuse("image_std", "holds a number that is not above 0 and finite");
  if (!fields.has("do_center_crop") || !fields.boolean("do_center_crop")) return;
  preprocess.mode = nn::ResizeMode::crop;
  if (fields.has("size")) preprocess.shorter = edge_of(fields, "size");
  if (preprocess.shorter < preprocess.size || preprocess.shorter > nn::kMaxImageSize)
    fields.refuse("size", cat("is ", preprocess.shorter, ", expected ", preprocess.size, " to ", nn::kMaxImageSize));
}

/// One of our tensors from one of theirs, or from query, key and value.
at::Tensor HfReader::read_tensor(const nn::TensorShape& wanted) {
  std::vector<at::Tensor> parts;
  std::vector<std::string> names = hf_names(wanted.name, model_, model_ == "deit", spelling_);
  std::vector<int64_t> shape = wanted.shape;
  shape[0] /= int64_t(names.size());
  for (std::string& name : names) {
    name = on_file(name);
    if (!shards_.has(name)) {
      if (!query_bias_ && names.size() == 3 && name.ends_with(".bias")) {
        parts.push_back(at::zeros(shape));
        continue;
      }
      fail(ExitCode::input, folder_.string(), ": has no tensor '", name, "', expected one of shape [", join(shape),
           "]");
    }
    const SafetensorsFile& file = shards_.file_of(name);
    const SafetensorsFile::Entry& entry = file.entries().find(name)->second;
    if (entry.shape != shape)
      fail(ExitCode::input, file.path().string(), ": tensor '", name, "' has shape [", join(entry.shape),
           "], expected [", join(shape), "]");
    used_.insert(name);
    parts.push_back(read_fp32(file, name));
  }
  return parts.size() == 1 ? parts[0] : at::cat(parts);
}

/// Tensors that a classifier's forward pass does not read may stand there; any other would be lost silently.
void HfReader::check_left_over(const nn::VitConfig& config) const {
  for (const std::string& name : shards_.names()) {
    if (used_.contains(name) || name.find("pooler.") != name.npos || name.ends_with("embeddings.mask_token")) continue;
    fail(ExitCode::input, shards_.file_of(name).path().string(), ": tensor '", printable(name),
         "' is none of this model's (", model_, ", depth ", config.depth, ")");
  }
}

ModelFile HfReader::read() {
  ModelFile model;
  read_config(model.config);
  find_head(model.config);
  nn::check_config(model.config, config_path_);
  model.config.arch = nn::arch_name(model.config);
  if (model.config.arch.empty()) model.config.arch = model_;
  read_class_names(model);
  read_processor(model);
  for (const nn::TensorShape& wanted : nn::tensor_shapes(model.config))
    model.weights.emplace(wanted.name, read_tensor(wanted));
  check_left_over(model.config);
  model.provenance["format"] = "Hugging Face transformers";
  return model;
}

nlohmann::json config_json(const ModelFile& model) {
  const nn::VitConfig& config = model.config;
  nlohmann::json labels = nlohmann::json::object(), numbers = nlohmann::json::object();
  for (int64_t i = 0; i < config.num_classes; ++i) {
    const std::string name = model.class_names.empty() ? cat("LABEL_", i) : model.class_names[size_t(i)];
    labels[std::to_string(i)] = name;
    numbers[name] = i;
  }
  const char* architecture = config.distilled         ? "DeiTForImageClassificationWithTeacher"
                             : config.num_classes > 0 ? "ViTForImageClassification"
                                                      : "ViTModel";
  return {{"architectures", {architecture}},
          {"model_type", config.distilled ? "deit" : "vit"},
          {"hidden_size", config.embed_dim},
          {"num_hidden_layers", config.depth},
          {"num_attention_heads", config.num_heads},
          {"intermediate_size", config.mlp_dim},
          {"hidden_act", "gelu"},
          {"hidden_dropout_prob", 0.0},
          {"attention_probs_dropout_prob", 0.0},
          {"layer_norm_eps", config.norm_eps},
          {"image_size", config.image_size},
          {"patch_size", config.patch_size},
          {"num_channels", 3},
          {"qkv_bias", true},
          {"id2label", labels},
          {"label2id", numbers}};
}

nlohmann::json processor_json(const ModelFile& model) {
  const nn::Preprocess& p = model.preprocess;
  const nlohmann::json square = {{"height", p.size}, {"width", p.size}};
  nlohmann::json json = {{"image_processor_type", model.config.distilled ? "DeiTImageProcessor" : "ViTImageProcessor"},
                         {"do_resize", true},
                         {"resample", kBicubic},
                         {"size", square},
                         {"do_rescale", true},
                         {"rescale_factor", 1.0 / 255},
                         {"do_normalize", true},
                         {"image_mean", p.mean},
                         {"image_std", p.std}};
  if (p.mode == nn::ResizeMode::crop) {
    json["size"] = {{"shortest_edge", p.shorter}};
    json["do_center_crop"] = true;
    json["crop_size"] = square;
  }
  return json;
}

sdk::TensorMap hf_tensors(const ModelFile& model) {
  const bool distilled = model.config.distilled;
  sdk::TensorMap tensors;
  sdk::TensorMap weights = model.weights;
  if (model.config.no_embed_class) {  // transformers adds a position to every token
    const at::Tensor& positions = weights.at("pos_embed");
    weights["pos_embed"] = at::constant_pad_nd(positions, {0, 0, model.config.protected_tokens(), 0});
  }
  for (const auto& [name, tensor] : weights) {
    const auto names = hf_names(name, distilled ? "deit" : "vit", distilled, HfSpelling::on_disk);
    const std::vector<at::Tensor> parts = tensor.detach().to(at::kFloat).chunk(int64_t(names.size()));
    for (size_t i = 0; i < names.size(); ++i) {
      // A file without a classifier is the bare model's, whose names have no prefix.
      const bool bare = model.config.num_classes == 0;
      tensors.emplace(bare ? names[i].substr(names[i].find('.') + 1) : names[i], parts[i].contiguous());
    }
  }
  return tensors;
}

}  // namespace

bool is_hf_folder(const fs::path& folder) {
  std::error_code error;
  return fs::is_directory(folder, error) && fs::exists(folder / "config.json", error);
}

ModelFile read_hf_model(const fs::path& folder) {
  return HfReader(folder).read();
}

void write_hf_model(const fs::path& folder, const ModelFile& model) {
  if (model.merge)
    fail(ExitCode::usage, folder.string(), ": a Hugging Face folder cannot carry the merge '", model.merge->name,
         "'; use --format pyra, or --drop-merge to write the dense model");
  if (model.config.pool == nn::Pool::avg)
    fail(ExitCode::usage, folder.string(), ": transformers' ViT has no average pooling; use --format pyra or timm");
  if (model.config.registers > 0)
    fail(ExitCode::usage, folder.string(), ": transformers' ViT has no register tokens; use --format pyra or timm");
  std::error_code error;
  if (!fs::create_directory(folder, error))
    fail(ExitCode::output, folder.string(), ": cannot be created: ", error ? error.message() : "it is there already");
  write_safetensors(folder / kHfWeights, hf_tensors(model));
  write_file(folder / "config.json",
             config_json(model).dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  write_file(folder / "preprocessor_config.json", processor_json(model).dump(2) + "\n");
}

}  // namespace pyra::io
