// Classes of single images.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/progress.h"
#include "data/dataset.h"
#include "tasks/run_model.h"

namespace pyra::tasks {

struct PredictOptions {
  RunOptions run;
  std::filesystem::path input;       ///< an image; or a folder or .tar, as Dataset::unlabelled takes it
  std::optional<std::string> bytes;  ///< the encoded image itself instead; `input` is then only its name
  int64_t top = 5;
  int64_t batch = 32;
  data::BadImages bad_images = data::BadImages::fail;  ///< of a folder or .tar
};

struct ClassProbability {
  int64_t label = 0;
  std::string name;  ///< the label's number where the model knows no names
  double probability = 0;
};

struct Prediction {
  std::string path;                   ///< `input`, or below it; inside a .tar from its root
  std::vector<ClassProbability> top;  ///< most probable first; ties by the lowest label
};

struct Predictions {
  std::vector<Prediction> images;
  std::vector<data::BadImage> skipped;
};

/// Error(input) for an image that cannot be read or a folder without images, Error(untrusted) when a logit is not
/// finite.
[[nodiscard]] Predictions predict(const PredictOptions& options, const host::PluginRegistry& plugins,
                                  Progress& progress = silent_progress());

}  // namespace pyra::tasks
