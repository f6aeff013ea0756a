// Recipes: what to train and how, from TOML and --set. Defaults stand in these structs only; keys are the
// fields' names. An unknown key is Error(usage) with file:line and the nearest name.
#pragma once
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nn/preprocess.h"
#include "sdk/parameters.h"

namespace pyra::io {

struct TrainSettings {
  int64_t epochs = 100;
  double max_seconds = 0;  ///< 0: no limit; else the schedule is squeezed into this training time
  int64_t batch = 32;
  std::vector<double> lr{1e-3};  ///< several: chosen on val200 (protocol vtab)
  double merge_lr = 0;           ///< the merger's own tensors; 0: the same as lr (the authors' program)
  double min_lr = 1e-5;
  double warmup_lr = 1e-6;
  int64_t warmup_epochs = 10;
  double weight_decay = 1e-4;
  double drop_path = 0.1;
  bool hflip = false;
  bool random_resized_crop = false;
  int64_t checkpoint_every = 0;  ///< steps; 0: every epoch
  int64_t eval_every = 0;        ///< epochs; 0: only at the end (protocol "paper": 10)
  /// A model that teaches, or "": loss = (1 - w) cross-entropy + w T² KL(teacher at T, student at T), with w the weight
  /// and T the temperature (Hinton et al., arXiv 1503.02531). At weight 1 labels do not count.
  std::string teacher;
  double teacher_weight = 0.5;
  double teacher_temperature = 2;
  bool operator==(const TrainSettings&) const = default;
};

struct PluginChoice {
  std::string name;  ///< "" : none
  /// Checked against the plugin's declaration when it is loaded.
  std::map<std::string, sdk::ParameterValue> parameters;
  /// Opens messages about the parameters: "recipe vit.toml:12: [peft]", "--set peft.rnk=4"; "" when no one named them.
  std::string where{};
  bool operator==(const PluginChoice& other) const { return name == other.name && parameters == other.parameters; }
};

struct Recipe {
  std::filesystem::path file;  ///< "" when everything came from --set
  std::filesystem::path model, data, out;
  int64_t seed = 0;
  std::string protocol = "vtab";  ///< "vtab" or "paper"
  std::string dtype;              ///< empty: fp32 on the CPU, bf16 on a GPU
  bool new_head = false;
  bool deterministic = false;  ///< on a GPU: nothing is chosen by timing
  TrainSettings train;
  PluginChoice peft{.name = "lora", .parameters = {}};
  PluginChoice merge;
  std::string schedule;                ///< [merge] schedule
  bool proportional_attention = true;  ///< [merge] proportional_attention
  std::optional<int64_t> image_size;   ///< [preprocess] size
  std::optional<std::string> resize;   ///< [preprocess] resize: "squash" or "crop"
  std::vector<double> mean, std;       ///< [preprocess]; empty: the model's
  bool operator==(const Recipe&) const = default;
};

/// `file` may be empty; `overrides` are "key=value" as --set takes them: value is TOML, a bare word is a string, and
/// the last one for a key wins. Paths are relative to the working folder, as they are typed, wherever the recipe lies.
/// Another plugin name by --set drops the parameters that the file gives the plugin it names. No key is required here.
/// Error(usage): "recipe vit.toml:12: train.batchs is not a key; did you mean 'batch'?", "--set train.batch=x: …".
[[nodiscard]] Recipe read_recipe(const std::filesystem::path& file, const std::vector<std::string>& overrides);

/// The resolved recipe as TOML: reading it gives the same Recipe (but for `file` and where things stood).
[[nodiscard]] std::string to_toml(const Recipe& recipe);

/// The override that sets `key` to this very text, whatever is in it: for options like --model PATH.
[[nodiscard]] std::string recipe_override(std::string_view key, std::string_view text);

/// Whether a recipe can hold the text.
[[nodiscard]] bool is_utf8(const std::string& text);

}  // namespace pyra::io
