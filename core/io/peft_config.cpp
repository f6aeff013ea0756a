#include "io/peft_config.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <string_view>

#include "base/error.h"
#include "io/json.h"
#include "io/json_fields.h"
#include "nn/config.h"

namespace pyra::io {
using nlohmann::json;
namespace {

constexpr size_t kMaxNames = 8192, kMaxPatterns = 1024;
constexpr size_t kMaxExpressionBytes = 512, kMaxPatternBytes = 64 << 10;  // what matching takes grows with them

/// Options that make of LoRA something else, with what to call it.
struct Refused {
  const char* key;
  const char* what;
};
constexpr Refused kRefused[] = {{"use_dora", "DoRA"},
                                {"use_qalora", "QA-LoRA"},
                                {"use_bdlora", "block-diagonal LoRA"},
                                {"layer_replication", "replicated layers"},
                                {"target_parameters", "LoRA on bare parameters"},
                                {"trainable_token_indices", "trained token embeddings"},
                                {"megatron_config", "Megatron's parallel layers"},
                                {"loftq_config", "LoftQ, which changes the base model"},
                                {"corda_config", "CorDA, which changes the base model"},
                                {"lora_ga_config", "LoRA-GA, which changes the base model"},
                                {"kasa_config", "KaSA"},
                                {"arrow_config", "Arrow, which chooses among adapters"},
                                {"alora_invocation_tokens", "activated LoRA"},
                                {"velora_config", "VeLoRA"},
                                {"monteclora_config", "MonteCLoRA"}};

/// Options that are read, or that change nothing of what a trained adapter computes.
constexpr std::string_view kKnown[] = {"peft_type",
                                       "task_type",
                                       "auto_mapping",
                                       "peft_version",
                                       "base_model_name_or_path",
                                       "revision",
                                       "inference_mode",
                                       "r",
                                       "lora_alpha",
                                       "lora_dropout",
                                       "fan_in_fan_out",
                                       "bias",
                                       "lora_bias",
                                       "use_rslora",
                                       "target_modules",
                                       "exclude_modules",
                                       "modules_to_save",
                                       "layers_to_transform",
                                       "layers_pattern",
                                       "rank_pattern",
                                       "alpha_pattern",
                                       "init_lora_weights",
                                       "eva_config",
                                       "megatron_core",
                                       "qalora_group_size",
                                       "ensure_weight_tying"};

/// Initial values that leave the base model as it is; those of other methods put a part of it into the adapter.
constexpr std::string_view kPlainInits[] = {"gaussian", "eva", "orthogonal"};

/// null, false, {}, [] and "" are how peft writes what is not used.
bool is_set(const json& value) {
  if (value.is_null()) return false;
  if (value.is_boolean()) return value.get<bool>();
  if (value.is_string()) return !value.get_ref<const std::string&>().empty();
  if (value.is_object() || value.is_array()) return !value.empty();
  return true;
}

class Reader {
 public:
  Reader(const json& document, const std::string& where) : fields_(document, where) {}

  PeftConfig read() {
    check_type();
    check_refused();
    check_init();
    PeftConfig config;
    if (has("r")) config.rank = rank("r", fields_.integer("r"));
    if (has("lora_alpha")) config.alpha = finite("lora_alpha", fields_.number("lora_alpha"));
    config.rslora = has("use_rslora") && fields_.boolean("use_rslora");
    config.rank_pattern = patterns("rank_pattern");
    for (const PeftPattern& pattern : config.rank_pattern) (void)rank("rank_pattern", pattern.value);
    config.alpha_pattern = patterns("alpha_pattern");
    config.targets = modules("target_modules");
    if (has("exclude_modules")) config.excluded = modules("exclude_modules");
    config.modules_to_save = names("modules_to_save");
    config.layer_lists = names("layers_pattern");
    config.layers = layers();
    if (has("base_model_name_or_path")) config.base = fields_.string("base_model_name_or_path");
    return config;
  }

 private:
  [[nodiscard]] bool has(const char* key) const { return fields_.has(key) && is_set(fields_.value(key)); }

  void check_type() const {
    const std::string type = fields_.string("peft_type");
    if (type != "LORA")
      fields_.refuse("peft_type", cat("is '", printable(type),
                                      "', expected LORA: adapters of other methods are not "
                                      "read; merge them with peft (merge_and_unload) and give the model"));
  }

  void check_refused() const {
    for (const Refused& option : kRefused)
      if (has(option.key))
        fields_.refuse(option.key, cat("is set: that is ", option.what,
                                       ", which is not plain LoRA and not read here; merge it with peft "
                                       "(merge_and_unload) and give the model"));
    for (const auto& [key, value] : fields_.whole().items()) {
      if (std::ranges::find(kKnown, key) != std::end(kKnown)) continue;
      // A number or a word alone switches nothing on: peft writes the defaults of all its options.
      const bool switched_on = is_set(value) && (value.is_boolean() || value.is_structured());
      if (switched_on) fields_.refuse(key, "is set and not known here: what it changes would be lost");
    }
  }

  /// PiSSA, OLoRA and their like subtract the adapter's first values from the base model, which a file does not show.
  void check_init() const {
    if (!has("init_lora_weights")) return;
    const json& value = fields_.value("init_lora_weights");
    if (value.is_boolean()) return;
    const std::string name = fields_.string("init_lora_weights");
    if (std::ranges::find(kPlainInits, name) == std::end(kPlainInits))
      fields_.refuse("init_lora_weights",
                     cat("is '", printable(name),
                         "': the adapter belongs to a base model changed by that method, not "
                         "to the published one; save it with peft's path_initial_model_for_weight_conversion"));
  }

  int64_t rank(const char* key, double value) const {
    if (!(value >= 1 && value <= double(nn::kMaxEmbedDim)) || value != std::floor(value))
      fields_.refuse(key, cat("holds the rank ", value, ", expected 1 to ", nn::kMaxEmbedDim));
    return int64_t(value);
  }

  double finite(const char* key, double value) const {
    if (!std::isfinite(value) || std::abs(value) > 1e9)
      fields_.refuse(key, cat("holds ", value, ", expected a number of at most 1e9"));
    return value;
  }

  /// Nothing when the text is no expression in the syntax that Python and ECMAScript share.
  static std::optional<std::regex> expression(const std::string& text) {
    // A count of repetitions is worked out in full: 'a{9999}' is as long as it says.
    if (text.size() > kMaxExpressionBytes || text.find('{') != std::string::npos) return {};
    try {
      // A file's expression must not take exponential time; libstdc++'s other matcher is linear in the text.
      return std::regex(text, std::regex::ECMAScript | std::regex_constants::__polynomial);
    } catch (const std::regex_error&) {
      return {};
    }
  }

  std::vector<PeftPattern> patterns(const char* key) const {
    if (!has(key)) return {};
    const JsonFields object = fields_.object(key);
    if (object.whole().size() > kMaxPatterns)
      fields_.refuse(key, cat("has ", object.whole().size(), " entries, expected at most ", kMaxPatterns));
    std::vector<PeftPattern> list;
    size_t bytes = 0;
    for (const auto& [name, value] : object.whole().items()) {
      bytes += name.size();
      if (bytes > kMaxPatternBytes) fields_.refuse(key, cat("has keys of more than ", kMaxPatternBytes, " bytes"));
      auto compiled = expression(cat("(?:.*\\.)?(?:", name, ")"));
      if (!compiled) object.refuse(name, "is no regular expression that is understood here");
      const double number = finite(key, object.number(name.c_str()));
      list.push_back({name, std::move(*compiled), number});
    }
    return list;
  }

  PeftModules modules(const char* key) const {
    PeftModules modules;
    if (!has(key)) {
      modules.unknown = true;
    } else if (fields_.value(key).is_string()) {
      const std::string text = fields_.string(key);
      modules.all_linear = text == "all-linear";
      if (!modules.all_linear) modules.expression = expression(text);
      modules.unknown = !modules.all_linear && !modules.expression;
    } else {
      modules.names = names(key);
    }
    return modules;
  }

  std::vector<std::string> names(const char* key) const {
    if (!has(key)) return {};
    if (fields_.value(key).is_string()) return {fields_.string(key)};
    std::vector<std::string> list = fields_.strings(key);
    if (list.size() > kMaxNames) fields_.refuse(key, cat("has ", list.size(), " names, expected at most ", kMaxNames));
    return list;
  }

  std::vector<int64_t> layers() const {
    const char* key = "layers_to_transform";
    // A single layer 0 is a number, and set.
    if (!has(key)) return {};
    const std::vector<int64_t> list =
        fields_.value(key).is_array() ? fields_.integers(key) : std::vector<int64_t>{fields_.integer(key)};
    if (list.size() > kMaxNames) fields_.refuse(key, cat("has ", list.size(), " layers, expected at most ", kMaxNames));
    return list;
  }

  JsonFields fields_;
};

const PeftPattern* first_match(const std::vector<PeftPattern>& patterns, const std::string& module) {
  const auto found = std::ranges::find_if(
      patterns, [&](const PeftPattern& pattern) { return std::regex_match(module, pattern.expression); });
  return found == patterns.end() ? nullptr : &*found;
}

/// The layer a module lies in and the name of the list of layers: "vit.layers.3.mlp.fc1" in 3 of "layers".
std::optional<std::pair<int64_t, std::string>> layer_of(const std::string& module) {
  const std::vector<std::string> parts = split(module, '.');
  for (size_t i = 1; i + 1 < parts.size(); ++i) {
    const bool number =
        !parts[i].empty() && parts[i].size() < 6 && parts[i].find_first_not_of("0123456789") == std::string::npos;
    if (number) return std::pair{int64_t(std::stoi(parts[i])), parts[i - 1]};
  }
  return {};
}

}  // namespace

bool PeftModules::match(const std::string& module) const {
  if (expression) return std::regex_match(module, *expression);
  return std::ranges::any_of(names, [&](const std::string& name) {
    return module == name ||
           (module.size() > name.size() && module.ends_with(name) && module[module.size() - name.size() - 1] == '.');
  });
}

int64_t PeftConfig::rank_of(const std::string& module) const {
  const PeftPattern* pattern = first_match(rank_pattern, module);
  return pattern ? int64_t(pattern->value) : rank;
}

double PeftConfig::scale_of(const std::string& module) const {
  const PeftPattern* pattern = first_match(alpha_pattern, module);
  const auto r = double(rank_of(module));
  return (pattern ? pattern->value : alpha) / (rslora ? std::sqrt(r) : r);
}

bool PeftConfig::has_term(const std::string& module) const {
  if (!targets.match(module) || excluded.match(module) || saves(module)) return false;
  if (layers.empty()) return true;
  const auto layer = layer_of(module);
  if (!layer || std::ranges::find(layers, layer->first) == layers.end()) return false;
  return layer_lists.empty() || std::ranges::find(layer_lists, layer->second) != layer_lists.end();
}

bool PeftConfig::saves(const std::string& module) const {
  return std::ranges::any_of(modules_to_save, [&](const std::string& name) {
    for (size_t end = module.size(); end != std::string::npos && end > 0; end = module.rfind('.', end - 1))
      if (std::string_view(module).substr(0, end).ends_with(name)) return true;
    return false;
  });
}

PeftConfig read_peft_config(const std::filesystem::path& path) {
  const json document = read_json(path, kMaxPeftConfigBytes);
  return Reader(document, path.string()).read();
}

}  // namespace pyra::io
