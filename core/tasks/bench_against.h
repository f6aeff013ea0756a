// Another build of pyractl against this one, taken in turn on one machine: the sharpest comparison there is.
#pragma once
#include <filesystem>
#include <vector>

#include "base/progress.h"
#include "tasks/bench_compare.h"
#include "tasks/bench_report.h"

namespace pyra::tasks {

struct AgainstOptions {
  std::filesystem::path other;  ///< the pyractl to compare with: the base
  std::filesystem::path self = "/proc/self/exe";
  std::vector<std::filesystem::path> plugin_path;  ///< for both; each finds its own plugins beside itself
  int64_t pairs = 9;                               ///< of short runs; as many again when they leave the verdict open
};

/// Runs `pyractl bench` of both with these settings, a pair at a time, the first of a pair alternating, and compares
/// the pairs. Each run is short: 3 repetitions unless the settings say how many. Error(usage) when a program cannot be
/// started or fails (its message is passed on), Error(input) when it prints no report.
[[nodiscard]] Comparison compare_against(const AgainstOptions& against, const BenchSettings& settings,
                                         const CompareOptions& options, Progress& progress = silent_progress());

}  // namespace pyra::tasks
