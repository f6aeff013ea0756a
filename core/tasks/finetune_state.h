// What a fine-tuning run remembers between processes, beside tensors and position: the JSON in its checkpoints.
#pragma once
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/progress.h"
#include "io/recipe.h"
#include "tasks/finetune.h"

namespace pyra::tasks {

/// What must not change between a run and its continuation.
struct RunIdentity {
  std::string recipe;                          ///< resolved, TOML
  std::string model, data;                     ///< fingerprints: base weights; images and labels of the training
  std::map<std::string, std::string> plugins;  ///< "merge pyra" -> "1.0"
  int threads = 0;
  std::string device;  ///< "cpu" or "cuda"
};

/// A look at an evaluation split.
struct Evaluation {
  double accuracy = 0;
  int64_t correct = 0, images = 0;
  int64_t epoch = 0, step = 0;  ///< trained before it
  double images_per_second = 0;
};

struct FinetuneState {
  RunIdentity identity;
  int64_t training = 0;            ///< number of the current training in the plan
  std::vector<Choice> choices;     ///< trials that are done
  std::optional<Evaluation> best;  ///< of the current training
  int64_t evaluated_step = -1;     ///< the last evaluation of the current training
  int64_t metrics_bytes = 0;       ///< of metrics.jsonl that belong to this state
};

[[nodiscard]] std::string to_json(const FinetuneState& state);
/// Error(input); `where` opens the message.
[[nodiscard]] FinetuneState parse_state(const std::string& json, const std::string& where);

/// Throws Error(usage) naming what differs: the recipe's key, the model, the data, the plugin. Paths of model, data
/// and run folder may differ, their contents may not. Another number of threads is a note: last bits may differ.
void check_same_run(const RunIdentity& saved, const RunIdentity& mine, const std::string& where, Progress& progress);

/// Every key of a TOML text with its value as TOML: "train.lr" -> "[ 0.001 ]".
[[nodiscard]] std::map<std::string, std::string> flatten_toml(const std::string& text);

}  // namespace pyra::tasks
