// Gives a model a token merger, shows what that changes, and writes the result.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/progress.h"
#include "tasks/rate_search_task.h"
#include "tasks/run_model.h"
#include "tasks/schedule_search.h"

namespace pyra::tasks {

struct CompressOptions {
  /// `run.set` takes the merger's own parameters: "merge.partition=random".
  RunOptions run;
  std::string merge;  ///< the merger's name
  /// Exactly one of the three.
  std::string schedule;                  ///< low, high, N, N@inflection, a,b,c, file.toml
  std::string target_macs;               ///< "0.5" of the dense model's, or an absolute count
  std::optional<double> target_speedup;  ///< measured, over the dense model
  /// DiffRate's counts for `target_macs`, trained on data; else a target is searched for as below.
  std::optional<RateSearchOptions> search;
  /// How (schedule_search.h).
  std::filesystem::path data, latency_table;
  int64_t images = 128, tries = 48;
  std::filesystem::path out;
  bool proportional_attention = true;
  bool measure = true;        ///< time both models; always done for a target_speedup
  bool allow_slower = false;  ///< write a model that was measured to be slower than dense
  int64_t batch = 32;
};

/// One column of the comparison.
struct CompressSide {
  std::string label;            ///< "dense", "tome-high"
  std::vector<int64_t> tokens;  ///< leaving each block
  int64_t macs = 0;             ///< of one image
  int64_t parameters = 0;
  std::optional<double> seconds;  ///< median for one batch
};

struct CompressResult {
  CompressSide dense, compressed;
  std::string arch, device, dtype;
  int64_t image_size = 0, batch = 0, runs = 0;      ///< runs: timed pairs
  std::vector<int64_t> remove, prune, merge;        ///< the resolved schedule
  std::optional<double> speedup;                    ///< median over pairs of dense time / compressed time
  std::optional<double> speedup_low, speedup_high;  ///< quartiles of the same
  std::optional<FoundSchedule> found;               ///< how a target was met
  std::optional<RateSearchReport> search;
};

/// Writes `out` only after everything else succeeded. Error(usage): the merger has to be trained first, the model
/// already carries a trained one, a target that no schedule reaches by counting. Error(untrusted), with the figures:
/// a speed-up that was not reached on this machine, a schedule that is slower than dense there. With `search` also what
/// search_rates throws.
[[nodiscard]] CompressResult compress(const CompressOptions& options, const host::PluginRegistry& plugins,
                                      Progress& progress = silent_progress());

}  // namespace pyra::tasks
