// adapter_config.json of a LoRA adapter in Hugging Face peft's layout: which modules have a term, and its scale.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <regex>
#include <string>
#include <vector>

namespace pyra::io {

/// A key of rank_pattern or alpha_pattern: a regular expression that the end of a module's path has to match, from a
/// dot or the path's beginning on.
struct PeftPattern {
  std::string key;
  std::regex expression;
  double value = 0;
};

/// Modules by what target_modules or exclude_modules says: a list of names, each a whole path or its last parts, or one
/// regular expression for the whole path.
struct PeftModules {
  std::vector<std::string> names;
  std::optional<std::regex> expression;
  bool all_linear = false;  ///< "all-linear", which peft itself spells out when it saves
  bool unknown = false;     ///< not said, or an expression in a syntax of Python's that is not understood here
  [[nodiscard]] bool match(const std::string& module) const;
};

/// What an adapter's config says, as far as it concerns plain LoRA.
struct PeftConfig {
  int64_t rank = 8;
  double alpha = 8;
  bool rslora = false;  ///< scale alpha / sqrt(rank)
  std::vector<PeftPattern> rank_pattern, alpha_pattern;
  PeftModules targets, excluded;
  std::vector<std::string> modules_to_save;
  std::vector<int64_t> layers;           ///< layers_to_transform; empty: all
  std::vector<std::string> layer_lists;  ///< layers_pattern: names of the module list that is counted; empty: any
  std::string base;                      ///< base_model_name_or_path, as the adapter gives it

  /// The rank and the factor on B A of a module. Where several patterns match, the first in the file's order (peft
  /// sorts its keys) counts, as in peft.
  [[nodiscard]] int64_t rank_of(const std::string& module) const;
  [[nodiscard]] double scale_of(const std::string& module) const;
  /// Whether the config gives the module a term: targets less excluded, within the layers.
  [[nodiscard]] bool has_term(const std::string& module) const;
  /// Whether modules_to_save names the module or one that holds it.
  [[nodiscard]] bool saves(const std::string& module) const;
};

inline constexpr size_t kMaxPeftConfigBytes = size_t{1} << 20;
inline constexpr const char* kPeftConfig = "adapter_config.json";
inline constexpr const char* kPeftWeights = "adapter_model.safetensors";
inline constexpr const char* kPeftPrefix = "base_model.model.";  ///< before every name in a file of peft's

/// Error(input) naming file and key: a peft_type other than LORA, an option that changes what the adapter computes and
/// is not plain LoRA (DoRA, QA-LoRA, replicated layers, PiSSA's initial values, … by name), an unknown option that is
/// switched on, values of the wrong type or out of range. fan_in_fan_out is of no consequence: it tells how a base
/// layer stores its weight, and a ViT's are all stored alike.
[[nodiscard]] PeftConfig read_peft_config(const std::filesystem::path& path);

}  // namespace pyra::io
