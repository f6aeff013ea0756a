#include "io/timm_model.h"

#include <ATen/Functions.h>

#include <charconv>
#include <cmath>
#include <set>

#include "base/error.h"
#include "io/json.h"
#include "io/model_metadata.h"

namespace pyra::io {
namespace {

// A block's two branches: where LayerScale stands, and the layer that it multiplies.
struct Branch {
  const char *scale, *deit3_scale, *layer;
};
constexpr Branch kBranches[] = {{".ls1.gamma", ".gamma_1", ".attn.proj"}, {".ls2.gamma", ".gamma_2", ".mlp.fc2"}};
// Metadata that becomes something other than provenance.
const std::set<std::string, std::less<>> kOwnKeys{"format", "architecture", "mean", "std", "num_heads", "class_names"};

/// The tensors of one file, by name without the wrapper's prefix.
class Tensors {
 public:
  Tensors(const NamedTensors& named, const std::string& prefix) : named_(named), prefix_(prefix) {}

  [[nodiscard]] const std::vector<int64_t>* find(const std::string& name) const {
    const auto found = named_.shapes.find(prefix_ + name);
    return found == named_.shapes.end() ? nullptr : &found->second;
  }
  [[nodiscard]] bool has(const std::string& name) const { return find(name) != nullptr; }

  /// The shape, which must be of this rank with these sizes where they are not -1.
  [[nodiscard]] const std::vector<int64_t>& shape(const std::string& name, const std::vector<int64_t>& expected,
                                                  const char* pattern) const {
    const std::vector<int64_t>* found = find(name);
    if (!found) {
      fail(ExitCode::input, path(), ": has no tensor '", name, "': not a ViT with timm's tensor names", hint());
    }
    bool fits = found->size() == expected.size();
    for (size_t i = 0; fits && i < expected.size(); ++i) fits = expected[i] == -1 || expected[i] == (*found)[i];
    if (!fits)
      fail(ExitCode::input, path(), ": tensor '", name, "' has shape [", join(*found), "], expected ", pattern);
    return *found;
  }

  [[nodiscard]] const std::string& path() const { return named_.where; }
  [[nodiscard]] const std::string* metadata(const std::string& key) const {
    const auto found = named_.metadata.find(key);
    return found == named_.metadata.end() ? nullptr : &found->second;
  }

 private:
  [[nodiscard]] std::string hint() const {
    for (const auto& [name, shape] : named_.shapes) {
      if (name.find("lora_A") != std::string::npos) {
        return "; this is a PEFT adapter, give the model it belongs to, or merge it with 'pyractl merge-lora'";
      }
      if (name.find("embeddings.patch_embeddings") != std::string::npos) {
        return "; these are Hugging Face transformers' names: give the folder, with its config.json, not the file";
      }
    }
    return "";
  }

  const NamedTensors& named_;
  const std::string& prefix_;
};

int64_t count_blocks(const Tensors& tensors) {
  int64_t depth = 0;
  while (depth <= nn::kMaxDepth && tensors.has(cat("blocks.", depth, ".attn.qkv.weight"))) ++depth;
  return depth;
}

int64_t square_root(int64_t tokens) {
  const auto side = int64_t(std::sqrt(double(std::max<int64_t>(tokens, 0))));
  return side * side == tokens ? side : 0;
}

/// Patches in a row, and whether positions are of patches alone: real grids are too large for both to fit.
void find_grid(const Tensors& tensors, nn::VitConfig& config) {
  const int64_t prefix = config.protected_tokens();
  const int64_t tokens = tensors.shape("pos_embed", {1, -1, config.embed_dim}, "[1, tokens, embed_dim]")[1];
  int64_t side = square_root(tokens - prefix);
  config.no_embed_class = side == 0;
  if (config.no_embed_class) side = square_root(tokens);
  if (side == 0) {
    fail(ExitCode::input, tensors.path(), ": tensor 'pos_embed' has ", tokens, " tokens, expected a square of patches ",
         "with ", prefix, " before them, or alone");
  }
  config.image_size = side * config.patch_size;
}

std::optional<int64_t> stated_heads(const Tensors& tensors) {
  const std::string* text = tensors.metadata("num_heads");
  if (!text) return {};
  int64_t heads = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), heads);
  if (error != std::errc{} || end != text->data() + text->size() || heads < 1) {
    fail(ExitCode::input, tensors.path(), ": metadata 'num_heads' is '", printable(*text),
         "', expected a number from 1");
  }
  return heads;
}

bool same_body(const nn::VitConfig& a, const nn::VitConfig& b) {
  return a.embed_dim == b.embed_dim && a.depth == b.depth;
}

/// Heads leave no trace in names or shapes: the file's word, then the architecture's, then a published model of
/// the same size, then 64 channels a head, as nearly all have.
int64_t find_heads(const Tensors& tensors, const nn::VitConfig& config, const ReadModelOptions& options) {
  if (options.num_heads) return *options.num_heads;
  if (const auto heads = stated_heads(tensors)) return *heads;
  if (const auto named = named_arch(config.arch)) {
    if (same_body(*named, config)) return named->num_heads;
    fail(ExitCode::input, tensors.path(), ": metadata 'architecture' is '", printable(config.arch), "' (embed_dim ",
         named->embed_dim, ", depth ", named->depth, "), but its tensors have embed_dim ", config.embed_dim, ", depth ",
         config.depth, ": the number of heads is not known");
  }
  for (const std::string& name : nn::known_archs()) {
    if (const nn::VitConfig known = nn::arch_config(name); same_body(known, config)) return known.num_heads;
  }
  if (config.embed_dim % 64 == 0) return config.embed_dim / 64;
  fail(ExitCode::input, tensors.path(), ": the number of heads is not known: embed_dim ", config.embed_dim,
       " is not a multiple of 64, and the metadata has neither 'num_heads' nor an 'architecture' known here; 'pyractl "
       "convert --num-heads N' writes a file that says it");
}

/// "0.5", "0.485, 0.456, 0.406" or "[0.485, 0.456, 0.406]".
std::array<float, 3> parse_channels(const Tensors& tensors, const char* key, bool positive) {
  const std::string& text = *tensors.metadata(key);
  std::vector<float> values;
  for (const char *at = text.data(), *end = at + text.size(); at < end;) {
    if (std::string_view(" ,[]()").find(*at) != std::string_view::npos) {
      ++at;
      continue;
    }
    float value = 0;
    const auto [next, error] = std::from_chars(at, end, value);
    if (error != std::errc{} || !std::isfinite(value) || (positive && value <= 0) || values.size() == 3) {
      values.clear();
      break;
    }
    values.push_back(value);
    at = next;
  }
  if (values.size() == 1) values.resize(3, values[0]);
  if (values.size() != 3) {
    fail(ExitCode::input, tensors.path(), ": metadata '", key, "' is '", printable(text), "', expected one or three ",
         positive ? "numbers above 0" : "numbers");
  }
  return {values[0], values[1], values[2]};
}

nn::VitConfig infer_config(const Tensors& tensors, const ReadModelOptions& options) {
  nn::VitConfig config;
  if (const std::string* arch = tensors.metadata("architecture")) config.arch = *arch;
  const auto& patch = tensors.shape("patch_embed.proj.weight", {-1, 3, -1, -1}, "[embed_dim, 3, patch, patch]");
  if (patch[2] != patch[3]) {
    fail(ExitCode::input, tensors.path(), ": tensor 'patch_embed.proj.weight' has patches of ", patch[2], " x ",
         patch[3], ", expected squares");
  }
  config.embed_dim = patch[0];
  config.patch_size = patch[2];
  (void)tensors.shape("cls_token", {1, 1, config.embed_dim}, "[1, 1, embed_dim]");
  config.distilled = tensors.has("dist_token");
  if (tensors.has("reg_token"))
    config.registers = tensors.shape("reg_token", {1, -1, config.embed_dim}, "[1, registers, embed_dim]")[1];
  config.layer_scale = tensors.has("blocks.0.ls1.gamma") || tensors.has("blocks.0.gamma_1");
  find_grid(tensors, config);
  config.depth = count_blocks(tensors);
  config.mlp_dim = tensors.shape("blocks.0.mlp.fc1.weight", {-1, config.embed_dim}, "[mlp_dim, embed_dim]")[0];
  config.pool = tensors.has("fc_norm.weight") ? nn::Pool::avg : nn::Pool::token;
  config.num_classes =
      tensors.has("head.weight") ? tensors.shape("head.weight", {-1, config.embed_dim}, "[classes, embed_dim]")[0] : 0;
  config.num_heads = find_heads(tensors, config, options);
  nn::check_config(config, tensors.path());
  return config;
}

nn::Preprocess infer_preprocess(const Tensors& tensors, const nn::VitConfig& config) {
  nn::Preprocess preprocess{.size = config.image_size};
  if (config.distilled || config.pool == nn::Pool::avg || has_imagenet_statistics(config.arch) ||
      tensors.has("decoder_embed.weight")) {
    preprocess.mean = kImageNetMean;
    preprocess.std = kImageNetStd;
  }
  if (tensors.metadata("mean")) preprocess.mean = parse_channels(tensors, "mean", false);
  if (tensors.metadata("std")) preprocess.std = parse_channels(tensors, "std", true);
  return preprocess;
}

std::vector<std::string> parse_class_names(const Tensors& tensors, int64_t num_classes) {
  const std::string* text = tensors.metadata("class_names");
  if (!text) return {};
  const std::string where = tensors.path() + ": metadata 'class_names'";
  const nlohmann::json names = parse_json(*text, where, 2);
  const auto is_text = [](const nlohmann::json& name) { return name.is_string(); };
  if (!names.is_array() || int64_t(names.size()) != num_classes || !std::all_of(names.begin(), names.end(), is_text)) {
    fail(ExitCode::input, where, ": expected a list of ", num_classes, " names, one for each class of the head");
  }
  return names.get<std::vector<std::string>>();
}

std::string channels_text(const std::array<float, 3>& values) {
  return cat(shortest(values[0]), ", ", shortest(values[1]), ", ", shortest(values[2]));
}

}  // namespace

std::string wrapper_prefix(const NamedTensors& named) {
  constexpr int kMostWrappers = 8;  // a name may be megabytes of them
  std::string prefix;
  bool more = !named.shapes.empty();
  for (int round = 0; more && round < kMostWrappers; ++round) {
    more = false;
    for (const char* wrapper : {"module.", "_orig_mod."}) {
      const std::string longer = prefix + wrapper;
      const auto opens = [&](const auto& item) { return item.first.starts_with(longer); };
      if (!std::all_of(named.shapes.begin(), named.shapes.end(), opens)) continue;
      prefix = longer;
      more = true;
    }
  }
  return prefix;
}

bool droppable(std::string_view name) {
  return name.starts_with("pre_logits.") || name == "mask_token" || name.starts_with("decoder_");
}

bool has_imagenet_statistics(std::string_view arch) {
  return arch.starts_with("deit") || arch.starts_with("mae") || arch.find("dinov2") != arch.npos;
}

std::optional<nn::VitConfig> named_arch(const std::string& name) {
  try {
    return nn::arch_config(name);
  } catch (const Error&) {
    return {};  // any text may stand there; the shapes still tell the rest
  }
}

bool is_layer_scale(std::string_view name) {
  return name.starts_with("blocks.") && std::any_of(std::begin(kBranches), std::end(kBranches), [&](const Branch& b) {
           return name.ends_with(b.scale) || name.ends_with(b.deit3_scale);
         });
}

void fold_layer_scale(const NamedTensors& named, const std::string& prefix, ModelFile& model) {
  const Tensors tensors(named, prefix);
  for (int64_t i = 0; i < model.config.depth; ++i) {
    for (const Branch& branch : kBranches) {
      const std::string block = cat("blocks.", i), other = block + branch.deit3_scale;
      const std::string name = tensors.has(other) ? other : block + branch.scale;
      (void)tensors.shape(name, {model.config.embed_dim}, "[embed_dim]");
      const at::Tensor scale = named.fp32(prefix + name);
      at::Tensor& weight = model.weights.at(block + branch.layer + ".weight");
      at::Tensor& bias = model.weights.at(block + branch.layer + ".bias");
      weight = weight * scale.unsqueeze(1);
      bias = bias * scale;
    }
  }
}

sdk::TensorMap unit_layer_scale(const nn::VitConfig& config) {
  sdk::TensorMap scales;
  for (int64_t i = 0; i < config.depth; ++i)
    for (const Branch& branch : kBranches)
      scales.emplace(cat("blocks.", i, branch.scale), at::ones({config.embed_dim}, at::kFloat));
  return scales;
}

std::string unsupported_part(std::string_view name) {
  struct Part {
    std::string_view word;
    const char* reason;
  };
  static constexpr Part kParts[] = {{"mlp.w12.", "a SwiGLU MLP"},
                                    {"q_norm.", "normalised queries"},
                                    {"k_norm.", "normalised keys"},
                                    {"norm_pre.", "a norm before the blocks"},
                                    {"attn_pool.", "attention pooling"}};
  for (const Part& part : kParts) {
    if (name.find(part.word) != name.npos) return part.reason;
  }
  return "";
}

ModelFile describe_timm_model(const NamedTensors& named, const std::string& prefix, const ReadModelOptions& options) {
  for (const auto& [name, shape] : named.shapes) {
    if (const std::string part = unsupported_part(name); !part.empty()) {
      fail(ExitCode::input, named.where, ": tensor '", printable(name), "' means ", part,
           ", which this version does not know");
    }
  }
  const Tensors tensors(named, prefix);
  ModelFile model;
  model.config = infer_config(tensors, options);
  model.preprocess = infer_preprocess(tensors, model.config);
  model.class_names = parse_class_names(tensors, model.config.num_classes);
  for (const auto& [key, value] : named.metadata) {
    if (!kOwnKeys.contains(key)) model.provenance.emplace(key, value);
  }
  return model;
}

Metadata timm_metadata(const ModelFile& model) {
  Metadata metadata(model.provenance.begin(), model.provenance.end());
  metadata["architecture"] = model.config.arch;
  metadata["num_heads"] = std::to_string(model.config.num_heads);
  metadata["mean"] = channels_text(model.preprocess.mean);
  metadata["std"] = channels_text(model.preprocess.std);
  if (!model.class_names.empty()) {
    metadata["class_names"] =
        nlohmann::json(model.class_names).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  }
  return metadata;
}

}  // namespace pyra::io
