// Accuracy and speed of a model file on a data set.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/progress.h"
#include "data/dataset.h"
#include "io/model_file.h"
#include "tasks/run_model.h"

namespace pyra::tasks {

struct EvalOptions {
  RunOptions run;
  std::filesystem::path data;
  std::string split = "test";
  int64_t batch = 32;
  std::filesystem::path predictions;  ///< CSV path,label,predicted,probability; empty: none
  data::BadImages bad_images = data::BadImages::fail;
};

struct EvalResult {
  std::string arch, merge, dtype;  ///< merge: "dense" or "tome-high"
  std::string device;              ///< "cpu" or "cuda:0"
  int64_t images = 0;              ///< the denominator of every rate below
  int64_t correct = 0;
  std::optional<int64_t> correct_top5;  ///< only with more than 5 classes
  double loss = 0;                      ///< mean cross-entropy
  std::vector<data::BadImage> skipped;
  double forward_images_per_second =
      0;                         ///< the network alone; without the first batch, which warms up, if there are more
  double images_per_second = 0;  ///< decoding, resizing and the network
  int64_t macs = 0, parameters = 0;
  std::map<std::string, std::string> provenance;  ///< what the model's file says of its making
};

/// Runs every image of the split once, in order. Error(input) when the classes of model and data differ,
/// Error(untrusted) when a logit is not finite. The predictions file appears whole at the end or not at all.
[[nodiscard]] EvalResult evaluate(const EvalOptions& options, const host::PluginRegistry& plugins,
                                  Progress& progress = silent_progress());

/// Error(input) unless model and data tell as many classes apart, by the same names where both have some.
void check_classes(const io::ModelFile& model, const std::string& model_path, const data::Dataset& dataset);

}  // namespace pyra::tasks
