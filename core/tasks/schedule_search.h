// A schedule for a model, a merger and a machine: what the solver, the latency model and the likeness do together.
#pragma once
#include <filesystem>
#include <optional>
#include <string>

#include "base/progress.h"
#include "host/plugin_registry.h"
#include "tasks/assemble.h"
#include "tasks/likeness.h"
#include "tasks/schedule_solver.h"
#include "tasks/stopwatch.h"

namespace pyra::tasks {

/// Exactly one of `speedup` and `macs`.
struct ScheduleGoal {
  std::optional<double> speedup;  ///< over the dense model, on this device, or on the latency table's
  std::string macs;               ///< a share of the dense model's multiply-adds (0.5), or a count
  std::filesystem::path data;     ///< images to judge by, and to measure accuracy on; else seeded noise
  std::filesystem::path latency_table;
  int64_t images = 128;  ///< to judge by
  int64_t tries = 48;    ///< schedules that are judged; 0: the shape of `high`, scaled, unseen
  uint64_t seed = 0;
};

/// "speedup:3.0" and "macs:0.4", as a recipe's merge.schedule may say; nothing for any other text. Error(usage).
[[nodiscard]] std::optional<ScheduleGoal> parse_goal(const std::string& schedule);

/// `text` as multiply-adds: a share of `dense` (0.5) or a count (6.2e8). Error(usage) for what is neither, or no less
/// than `dense`.
[[nodiscard]] int64_t wanted_macs(const std::string& text, int64_t dense);

/// Removal counts of the published high schedule for this model, scaled: its shape is what trained models and ToMe's
/// figures are known for.
[[nodiscard]] RemovalCounts scaled_high(const nn::VitConfig& config, double factor);

struct FoundSchedule {
  RemovalCounts remove;
  std::optional<Timing> timing;     ///< measured; not with a latency table, not for macs
  std::optional<double> predicted;  ///< speed-up by the latency model, where one was used
  double model_error = 0;           ///< its largest relative error over what it was fitted to
  std::optional<double> likeness;   ///< of what was found; not with tries = 0
  RemovalCounts uniform;            ///< as many tokens in every block, at the same cost
  std::optional<double> uniform_likeness;
  int64_t tries = 0;
  /// With data whose classes are the model's, on test, val or val200: nothing that the search has seen.
  std::string accuracy_split;
  std::optional<SampledAccuracy> dense_accuracy, accuracy, uniform_accuracy;
};

struct SearchContext {
  const host::PluginRegistry& plugins;
  io::PluginChoice choice;
  bool proportional_attention = true;
  std::optional<uint64_t> fresh_seed;  ///< of a merger's trained tensors, where the search goes before their training
  engine::EngineOptions engine;
  int64_t batch = 32;
};

/// Finds the schedule and leaves it attached to `model`, which must be dense. Error(usage): a goal out of range, a
/// count of multiply-adds that the merger cannot reach; Error(untrusted), with the figures: a speed-up that it does not
/// reach on this machine.
[[nodiscard]] FoundSchedule find_schedule(Model& model, const ScheduleGoal& goal, const SearchContext& context,
                                          Progress& progress);

}  // namespace pyra::tasks
