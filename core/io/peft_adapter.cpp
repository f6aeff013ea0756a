#include "io/peft_adapter.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <set>
#include <string_view>

#include "base/error.h"

namespace pyra::io {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kA = ".lora_A.weight", kB = ".lora_B.weight", kBias = ".lora_B.bias";

bool is_head(std::string_view tensor) {
  return tensor.starts_with("head.") || tensor.starts_with("head_dist.");
}

std::string without(std::string text, std::string_view piece) {
  if (const size_t at = text.find(piece); at != std::string::npos) text.replace(at, piece.size(), ".");
  return text;
}

/// Where a tensor of the adapter's model stands in ours.
struct Slot {
  std::string tensor;          ///< ours
  std::vector<int64_t> shape;  ///< of this part
  int64_t part = 0, parts = 1;
};
using Slots = std::map<std::string, Slot, std::less<>>;

Slots slots_of(const nn::VitConfig& config, const PeftNaming& naming) {
  Slots slots;
  for (const nn::TensorShape& tensor : nn::tensor_shapes(config)) {
    const std::vector<std::string> names = peft_names(tensor.name, naming, config.distilled);
    Slot slot{.tensor = tensor.name, .shape = tensor.shape, .parts = int64_t(names.size())};
    slot.shape[0] /= slot.parts;
    for (; slot.part < slot.parts; ++slot.part) slots.emplace(names[size_t(slot.part)], slot);
  }
  return slots;
}

/// The module that a key's name gives a part of a term; "" for other tensors.
std::string term_module(std::string_view name) {
  for (const std::string_view end : {kA, kB, kBias})
    if (name.size() > end.size() && name.ends_with(end)) return std::string(name.substr(0, name.size() - end.size()));
  return "";
}

/// The path of the module that owns a tensor: "blocks.0.norm1" of "blocks.0.norm1.bias".
std::string module_of(std::string_view tensor) {
  const size_t dot = tensor.rfind('.');
  return std::string(tensor.substr(0, dot == std::string_view::npos ? 0 : dot));
}

class AdapterReader {
 public:
  AdapterReader(const fs::path& folder, const ModelFile& base)
      : base_(base), config_(base.config), file_(folder / kPeftWeights), where_(file_.path().string()) {
    adapter_.config = read_peft_config(folder / kPeftConfig);
  }

  PeftAdapter read() {
    sort_keys();
    find_naming();
    take_head();
    take_whole_tensors();
    check_head();
    take_terms();
    check_terms();
    check_saved();
    adapter_.num_classes = config_.num_classes;
    adapter_.metadata = file_.metadata();
    return std::move(adapter_);
  }

 private:
  void sort_keys();
  void find_naming();
  void take_head();
  void take_whole_tensors();
  void check_head() const;
  void take_terms();
  void add_bias(const Slot& weight, const std::string& module, double scale);
  void check_terms() const;
  void check_saved() const;
  void put(const Slot& slot, const at::Tensor& value);
  void refuse_scaled(const Slot& slot, const std::string& key) const;
  [[nodiscard]] at::Tensor value(const std::string& key) const;
  [[nodiscard]] std::string base_hint() const;
  [[noreturn]] void refuse_shape(const std::string& key, const std::vector<int64_t>& expected) const;
  [[nodiscard]] const std::vector<int64_t>& shape(const std::string& key) const {
    return file_.entries().find(key)->second.shape;
  }

  const ModelFile& base_;
  nn::VitConfig config_;  ///< the base's, with the adapter's classes
  SafetensorsFile file_;
  std::string where_;
  std::map<std::string, std::string> whole_;  ///< tensors by their names in the adapter's model -> key
  std::set<std::string> modules_;             ///< that have a term
  Slots slots_;
  std::set<std::string> taken_;  ///< names of `whole_` and modules that found their place
  PeftAdapter adapter_;
};

/// Keys are base_model.model.<module>.lora_A.weight and the like, or <module>.base_layer.bias, or a tensor's own name.
/// Where bias = "all" meets modules_to_save, peft 0.21 writes a head's bias three times.
void AdapterReader::sort_keys() {
  const std::string_view prefix = kPeftPrefix;
  for (const auto& [key, entry] : file_.entries()) {
    if (!key.starts_with(prefix))
      fail(ExitCode::input, where_, ": tensor '", printable(key), "' does not begin with ", prefix,
           ": not an adapter that peft's save_pretrained wrote");
    const std::string name = key.substr(prefix.size());
    if (name.find("lora_magnitude_vector") != std::string::npos)
      fail(ExitCode::input, where_, ": tensor '", printable(key),
           "' is DoRA's, which is not plain LoRA and not read here; merge it with peft (merge_and_unload)");
    if (const std::string module = term_module(name); !module.empty()) {
      modules_.insert(module);
    } else if (name.find(".original_module.") == std::string::npos) {
      const std::string plain = without(without(name, ".modules_to_save."), ".base_layer.");
      if (plain == name || !file_.contains(cat(prefix, plain))) whole_[plain] = key;
    }
  }
  if (modules_.empty()) fail(ExitCode::input, where_, ": holds no LoRA term (no tensor's name ends in ", kA, ")");
}

/// The naming in which most tensors are the base's; then all have to be.
void AdapterReader::find_naming() {
  nn::VitConfig config = config_;
  config.num_classes = std::max<int64_t>(config.num_classes, 1);  // a head may come with the adapter
  size_t best = 0;
  for (const PeftNaming& naming : peft_namings(config)) {
    Slots slots = slots_of(config, naming);
    const auto known = size_t(
        std::ranges::count_if(modules_, [&](const std::string& name) { return slots.contains(name + ".weight"); }) +
        std::ranges::count_if(whole_, [&](const auto& item) { return slots.contains(item.first); }));
    if (known <= best) continue;
    best = known;
    slots_ = std::move(slots);
    adapter_.naming = naming;
  }
  if (best == 0)
    fail(ExitCode::input, where_, ": no tensor is named as a layer of ", config.arch, " by timm or transformers, as '",
         printable(*modules_.begin()), "'", base_hint());
}

void AdapterReader::take_head() {
  const auto head = std::ranges::find_if(slots_, [](const auto& item) { return item.second.tensor == "head.weight"; });
  const auto found = whole_.find(head->first);
  if (found != whole_.end()) {
    const std::vector<int64_t>& sizes = shape(found->second);
    if (sizes.size() != 2 || sizes[0] < 1 || sizes[0] > nn::kMaxClasses || sizes[1] != config_.embed_dim)
      refuse_shape(found->second, {std::max<int64_t>(config_.num_classes, 1), config_.embed_dim});
    config_.num_classes = sizes[0];
    adapter_.brings_head = true;
  } else if (config_.num_classes == 0) {
    fail(ExitCode::input, where_, ": holds no head (no tensor '", kPeftPrefix, head->first,
         "'), and the base model has none either: name the head in modules_to_save when training, or give a base "
         "model with the head that the adapter was trained under");
  }
  slots_ = slots_of(config_, adapter_.naming);
  for (const auto& [name, tensor] : base_.weights)
    if (!is_head(name) || config_.num_classes == base_.config.num_classes) adapter_.weights.emplace(name, tensor);
}

at::Tensor AdapterReader::value(const std::string& key) const {
  at::Tensor tensor = read_fp32(file_, key);
  if (!tensor.isfinite().all().item<bool>())
    fail(ExitCode::input, where_, ": tensor '", printable(key), "' holds values that are not finite");
  return tensor;
}

void AdapterReader::put(const Slot& slot, const at::Tensor& value) {
  at::Tensor& whole = adapter_.weights[slot.tensor];
  if (slot.parts == 1) {
    whole = value;
    return;
  }
  whole = whole.clone();
  whole.narrow(0, slot.part * slot.shape[0], slot.shape[0]).copy_(value);
}

/// LayerScale is folded into what it follows, and what was trained in front of it would have to be scaled too. Ours was
/// trained beside the folded layer.
void AdapterReader::refuse_scaled(const Slot& slot, const std::string& key) const {
  const bool scaled =
      slot.tensor.find(".attn.proj.") != std::string::npos || slot.tensor.find(".mlp.fc2.") != std::string::npos;
  if (!config_.layer_scale || !scaled || file_.metadata().contains("pyra")) return;
  fail(ExitCode::input, where_, ": tensor '", printable(key),
       "' changes a layer in front of the base model's LayerScale,",
       " which is not supported; merge it with peft (merge_and_unload) and give that model");
}

void AdapterReader::take_whole_tensors() {
  for (const auto& [name, key] : whole_) {
    if (name.find("pooler.") != std::string::npos) continue;  // a classifier's forward pass does not read it
    const auto slot = slots_.find(name);
    if (slot == slots_.end())
      fail(ExitCode::input, where_, ": tensor '", printable(key), "' is none of the base model's (", base_.config.arch,
           ", depth ", config_.depth, ", names of ", library_of(adapter_.naming.names), ")", base_hint());
    if (shape(key) != slot->second.shape) refuse_shape(key, slot->second.shape);
    refuse_scaled(slot->second, key);
    put(slot->second, value(key));
    taken_.insert(name);
  }
}

/// A head of another number of classes has to come whole.
void AdapterReader::check_head() const {
  for (const auto& [name, slot] : slots_)
    if (is_head(slot.tensor) && !adapter_.weights.contains(slot.tensor))
      fail(ExitCode::input, where_, ": has no tensor '", kPeftPrefix, name, "' of shape [", join(slot.shape),
           "], but another tensor of a head with ", config_.num_classes, " classes");
}

void AdapterReader::take_terms() {
  for (const std::string& module : modules_) {
    if (module.find("pooler.") != std::string::npos) continue;
    const std::string a_key = cat(kPeftPrefix, module, kA), b_key = cat(kPeftPrefix, module, kB);
    for (const std::string& key : {a_key, b_key})
      if (!file_.contains(key))
        fail(ExitCode::input, where_, ": has no tensor '", printable(key), "', the other half of a term");
    const auto found = slots_.find(module + ".weight");
    if (found == slots_.end() || found->second.shape.size() < 2)
      fail(ExitCode::input, where_, ": tensor '", printable(a_key), "' is a term of no layer of the base model (",
           base_.config.arch, ", depth ", config_.depth, ", names of ", library_of(adapter_.naming.names), ")",
           base_hint());
    const Slot& slot = found->second;
    refuse_scaled(slot, a_key);
    const int64_t rank = adapter_.config.rank_of(module);
    std::vector<int64_t> a_shape = slot.shape, b_shape(slot.shape.size(), 1);
    a_shape[0] = b_shape[1] = rank;
    b_shape[0] = slot.shape[0];
    if (shape(a_key) != a_shape) refuse_shape(a_key, a_shape);
    if (shape(b_key) != b_shape) refuse_shape(b_key, b_shape);
    const double scale = adapter_.config.scale_of(module);
    // Read first: GCC 12 frees a struct's members twice when an initialiser among them throws.
    const at::Tensor a = value(a_key).flatten(1), b = value(b_key).flatten(1);
    adapter_.terms[module_of(slot.tensor)].push_back(
        {.module = module, .a = a, .b = b, .scale = scale, .part = slot.part, .parts = slot.parts});
    add_bias(slot, module, scale);
  }
}

/// lora_bias: B has a bias, which the scale multiplies too.
void AdapterReader::add_bias(const Slot& weight, const std::string& module, double scale) {
  const std::string key = cat(kPeftPrefix, module, kBias);
  if (!file_.contains(key)) return;
  if (shape(key) != std::vector<int64_t>{weight.shape[0]}) refuse_shape(key, {weight.shape[0]});
  Slot bias = slots_.find(module + ".bias")->second;
  const at::Tensor before = adapter_.weights.at(bias.tensor).narrow(0, bias.part * bias.shape[0], bias.shape[0]);
  put(bias, before + value(key) * scale);
}

/// What peft would leave out, or train from nothing, must not go unnoticed.
void AdapterReader::check_terms() const {
  const PeftConfig& config = adapter_.config;
  if (config.targets.unknown || config.targets.all_linear || config.excluded.unknown) return;
  for (const auto& [name, slot] : slots_) {
    if (slot.shape.size() < 2 || !name.ends_with(".weight")) continue;
    const std::string module = module_of(name);
    if (config.has_term(module) && !modules_.contains(module))
      fail(ExitCode::input, where_, ": has no tensor '", kPeftPrefix, module, kA, "', and ", kPeftConfig,
           " gives that module a term (target_modules)");
    if (!config.has_term(module) && modules_.contains(module))
      fail(ExitCode::input, where_, ": holds a term of '", module, "', and ", kPeftConfig,
           " gives that module none (target_modules, exclude_modules, layers_to_transform, modules_to_save)");
  }
}

void AdapterReader::check_saved() const {
  for (const auto& [name, slot] : slots_)
    if (adapter_.config.saves(module_of(name)) && !taken_.contains(name))
      fail(ExitCode::input, where_, ": has no tensor '", kPeftPrefix, name, "', and ", kPeftConfig,
           " names its module in modules_to_save");
}

std::string AdapterReader::base_hint() const {
  return cat("; is this the base model that the adapter was trained on",
             adapter_.config.base.empty() ? "?" : cat(" ('", printable(adapter_.config.base), "')?"));
}

void AdapterReader::refuse_shape(const std::string& key, const std::vector<int64_t>& expected) const {
  fail(ExitCode::input, where_, ": tensor '", printable(key), "' has shape [", join(shape(key)), "], expected [",
       join(expected), "]", base_hint());
}

/// An adapter that is not called "default" lies in a folder of its name.
std::string adapters_below(const fs::path& folder) {
  std::error_code error;
  for (const auto& item : fs::directory_iterator(folder, error))
    if (fs::exists(item.path() / kPeftConfig, error))
      return cat("; there is an adapter in ", item.path().string(), ": give that folder");
  return "";
}

}  // namespace

bool is_peft_folder(const fs::path& folder) {
  std::error_code error;
  return fs::is_directory(folder, error) && fs::exists(folder / kPeftConfig, error);
}

void check_peft_folder(const fs::path& folder) {
  if (!is_peft_folder(folder))
    fail(ExitCode::input, folder.string(), ": holds no ", kPeftConfig, ": not an adapter of peft's",
         adapters_below(folder));
  std::error_code error;
  if (fs::exists(folder / kPeftWeights, error)) return;
  if (fs::exists(folder / "adapter_model.bin", error))
    fail(ExitCode::input, (folder / "adapter_model.bin").string(),
         ": a pickle of an old peft, which is not opened here; load the adapter with peft and save it again "
         "(save_pretrained writes ",
         kPeftWeights, ")");
  fail(ExitCode::input, folder.string(), ": holds no ", kPeftWeights, adapters_below(folder));
}

PeftAdapter read_peft_adapter(const fs::path& folder, const ModelFile& base) {
  check_peft_folder(folder);
  return AdapterReader(folder, base).read();
}

}  // namespace pyra::io
