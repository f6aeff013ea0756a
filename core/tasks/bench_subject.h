// What a benchmark runs: models, inputs and the names of rows.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "host/plugin_registry.h"
#include "tasks/bench_report.h"

namespace pyra::tasks {

/// One configuration, ready to run.
struct BenchSubject {
  BenchRow row;  ///< named and counted, without times
  /// Milliseconds that so many iterations take, each a batch inferred or a training step: on a GPU by its own events.
  std::function<double(int64_t)> time_ms;
  /// Bytes on the device where there is one; else empty, and the process's own peak counts.
  std::function<int64_t()> device_bytes{};
  std::function<std::vector<engine::Stage>()> profile{};
  std::function<void()> warmed{};                     ///< called when warm-up is over
  std::function<std::vector<double>()> latency_ms{};  ///< of every batch since then, where a row measures it
};

/// Every mode at every batch size, dense first, merged (where there is a merge) right behind it. `settings.device` and
/// `.dtype` are resolved. Error(usage) for settings that contradict one another or keys in `set` that mean nothing
/// here.
[[nodiscard]] std::vector<BenchSubject> make_subjects(const BenchSettings& settings,
                                                      const host::PluginRegistry& plugins);

/// <mode>/<arch>[@resolution]/<merge>[+peft]/<device>/<dtype>/b<batch>: @resolution only where the architecture's name
/// does not say it, +peft only in training and where it is not lora.
struct RowName {
  std::string mode, arch;
  int64_t image_size = 224;
  std::string merge = "dense";              ///< "<merger>-<schedule>"; of a schedule's file its name, without folders
  std::string peft, device = "cpu", dtype;  ///< device without its index: "cuda"
  int64_t batch = 1;
};
[[nodiscard]] std::string row_name(const RowName& parts);

}  // namespace pyra::tasks
