// A finished run folder, read back: what it was told, how training went, what came of it.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "io/recipe.h"
#include "tasks/finetune.h"

namespace pyra::tasks {

/// A line of metrics.jsonl of kind "train". `at` counts epochs with their fractions.
struct EpochPoint {
  double at = 0, loss = 0, accuracy = 0, lr = 0;
};

/// A line of kind "eval".
struct EvaluationPoint {
  double at = 0, accuracy = 0;
};

/// One training of a run: "train", or a trial "lr 0.001".
struct Curve {
  std::string training;
  std::string split;  ///< that its evaluations looked at
  std::vector<EpochPoint> epochs{};
  std::vector<EvaluationPoint> evaluations{};
};

struct RunRecord {
  std::filesystem::path folder;
  std::string name;  ///< the folder's own name
  io::Recipe recipe;
  FinetuneReport result;
  std::vector<Curve> curves;         ///< in the order they were trained; the last one is what counts
  std::vector<std::string> classes;  ///< names by label
  std::string base_fingerprint;      ///< of the model it started from
  int64_t adapter_bytes = 0;         ///< of the files in adapter/
};

/// Reads run.toml, metrics.jsonl, report.json and adapter/. Error(input) naming the file when the run is unfinished,
/// a file is missing, cut or makes no sense, or report.json and metrics.jsonl are not of one run.
[[nodiscard]] RunRecord read_run(const std::filesystem::path& folder);

}  // namespace pyra::tasks
