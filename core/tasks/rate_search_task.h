// DiffRate's search as a task: from a dense model, data and a target to kept counts, with a checkpoint on the way.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/progress.h"
#include "tasks/assemble.h"
#include "train/rate_search.h"

namespace pyra::tasks {

struct RateSearchOptions {
  std::filesystem::path data;  ///< folder or .tar: train800, or train where there is no such split
  int64_t epochs = 3;          ///< as published, and so are lr and batch's role
  double lr = 0.01;
  int64_t batch = 32;
  int64_t seed = 0;
  bool resume = false;                 ///< go on from the checkpoint beside the model that is to be written
  std::filesystem::path schedule_out;  ///< .toml that --schedule takes; empty: none
};

/// Counts tried on the split kept for choosing.
struct JudgedCounts {
  /// "dense"; "searched"; "start": what the search began with, the shape of high but for a first block that keeps all;
  /// "high-shaped" and "uniform": as the plugin makes them of removal counts. The last two where they reach the target.
  std::string label;
  train::KeptCounts counts;
  int64_t macs = 0;
  int64_t correct = 0;
};

struct RateSearchReport {
  train::KeptCounts counts;    ///< scaled by one factor to the most multiply-adds that do not exceed the target
  train::KeptCounts searched;  ///< as the last step left them
  int64_t target = 0, macs = 0, searched_macs = 0;
  std::string train_split;
  int64_t images = 0, steps = 0;
  double seconds = 0;        ///< of searching: steps only
  std::string judged_split;  ///< val200 or val; empty: the data has none
  int64_t judged_images = 0;
  std::vector<JudgedCounts> judged;  ///< all but dense cost as much as `counts`, or a little less
  bool resumed = false;
};

/// What search_rates needs of the command.
struct RateSearchTask {
  const RateSearchOptions& options;
  std::filesystem::path model_path, out;  ///< the checkpoint is in the folder "<out>.search", removed at the end
  int64_t target = 0;                     ///< multiply-adds
  std::string device;                     ///< resolved; of the search and of judging
  engine::Precision precision = engine::Precision::fp32;  ///< likewise
  bool proportional_attention = true;
};

/// Searches, fits the counts to the target, judges them beside counts of equal multiply-adds in other shapes, and
/// leaves `model` dense. Must be called outside InferenceMode. Errors: usage for options without sense, a target below
/// what DiffRate can reach, a checkpoint that is there without `resume` or is of another search; input for data and
/// model; untrusted when the search diverges; interrupted or terminated after a checkpoint, with how to go on.
[[nodiscard]] RateSearchReport search_rates(Model& model, const RateSearchTask& task,
                                            const host::PluginRegistry& plugins, Progress& progress);

/// Before anything is loaded. Error(usage or output).
void check_rate_search(const RateSearchOptions& options);

/// What the model is to carry: the counts, named "searched".
[[nodiscard]] sdk::Schedule searched_schedule(const RateSearchReport& report);
/// The counts as a file that --schedule takes. Atomic; Error(output).
void write_counts(const std::filesystem::path& path, const RateSearchReport& report);
/// Once `out` is written there is nothing to go on with.
void drop_search_checkpoint(const std::filesystem::path& out);

}  // namespace pyra::tasks
