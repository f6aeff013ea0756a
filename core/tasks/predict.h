// Classes of single images.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/progress.h"
#include "tasks/run_model.h"

namespace pyra::tasks {

struct PredictOptions {
  RunOptions run;
  std::filesystem::path input;       ///< an image, or a folder: all images below it, sorted by path
  std::optional<std::string> bytes;  ///< the encoded image itself instead; `input` is then only its name
  int64_t top = 5;
};

struct ClassProbability {
  int64_t label = 0;
  std::string name;  ///< the label's number where the model knows no names
  double probability = 0;
};

struct Prediction {
  std::string path;
  std::vector<ClassProbability> top;  ///< most probable first; ties by the lowest label
};

/// Error(input) for an image that cannot be read or a folder without images.
[[nodiscard]] std::vector<Prediction> predict(const PredictOptions& options, const host::PluginRegistry& plugins,
                                              Progress& progress = silent_progress());

}  // namespace pyra::tasks
