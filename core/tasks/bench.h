// pyractl bench: images per second of a model, dense and merged side by side, in inference and in training.
#pragma once
#include "base/progress.h"
#include "host/plugin_registry.h"
#include "tasks/bench_compare.h"
#include "tasks/bench_report.h"

namespace pyra::tasks {

/// Measures every mode, dense and (where there is a merge) merged, at every batch size. Warm-up first; then rounds,
/// each row once a round, so that whatever the machine does meanwhile hits all rows alike. Inputs are random,
/// seeded and made before any clock starts. A training step is train::Loop's: from decoded images to changed weights.
///
/// The result's settings are resolved (dtype, threads). Error(usage) for settings that contradict one another,
/// Error(untrusted) when a model computes what is not finite, Error(130, 143) when a signal came.
[[nodiscard]] BenchReport run_bench(const BenchSettings& settings, const host::PluginRegistry& plugins,
                                    Progress& progress = silent_progress());

/// Measures with `settings` now and compares with `base`. A verdict of SLOW or UNKNOWN is not believed at once: all is
/// measured again and both measurements' repetitions together decide, so a bad minute of the machine is no regression.
[[nodiscard]] Comparison compare_now(const BenchReport& base, const BenchSettings& settings,
                                     const host::PluginRegistry& plugins, const CompareOptions& options,
                                     Progress& progress = silent_progress());

/// "cpu" or "cuda:i", as resolve_device() says.
[[nodiscard]] std::string resolve_bench_device(const BenchSettings& settings);

/// What a base was measured with, with this run's threads and dtype as the base resolved them.
[[nodiscard]] BenchSettings settings_of(const BenchReport& base);

}  // namespace pyra::tasks
