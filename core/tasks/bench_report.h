// A benchmark's result as data: settings, machine, one row a measured configuration with all its repetitions.
#pragma once
#include <array>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"

namespace pyra::tasks {

/// What is measured: one batch after another; batches in flight, as eval has them; training steps; from encoded files
/// to labels.
inline constexpr std::array<std::string_view, 4> kBenchModes{"infer", "throughput", "train", "e2e"};

struct BenchSettings {
  std::string model;  ///< a model file, or "" for `arch`
  std::string arch;   ///< timm's name, random weights
  std::string merge;  ///< merge plugin beside the dense model; "": the one the file carries, if any
  std::string schedule;
  std::string peft = "lora";                ///< of training rows; inference is measured as deployed, without
  std::vector<std::string> modes{"infer"};  ///< of kBenchModes
  std::string data, split = "test";         ///< e2e: the files
  std::vector<int64_t> batches{32};
  std::string device = "auto", dtype = "auto";
  int64_t threads = 0;           ///< 0: as the process was told
  std::vector<std::string> set;  ///< key=value, parameters of the plugins
  int64_t repetitions = 0;       ///< rounds over all rows; 0: 9 to 40, until the noise is below 1 % or max_time is over
  double min_time = 0.2;         ///< seconds a repetition lasts at least
  double max_time = 30;          ///< seconds of rounds in all, when repetitions is 0; at least 3 rounds are done
  bool profile = false;          ///< a step-by-step profile of each inference row on a GPU
  int64_t warmup = 0;            ///< iterations before the first round; 0: until times are stable
};

// What a file or a command line may ask for: far above what a machine can do.
inline constexpr int64_t kMaxBenchBatch = 1 << 20, kMaxBenchThreads = 4096, kMaxBenchRepetitions = 10000;

struct CpuCache {
  std::string type{};  ///< "Data", "Instruction", "Unified"
  int64_t level = 0, size = 0, num_sharing = 0;
};

/// Where and with what a measurement was made.
struct BenchMachine {
  std::string date{}, host_name{}, executable{};
  int64_t num_cpus = 0;
  double mhz_per_cpu = 0;
  bool cpu_scaling_enabled = false;
  std::vector<CpuCache> caches{};
  std::vector<double> load_avg{};
  std::string library_build_type{};  ///< "release" or "debug"
  std::string device = "cpu", driver = "none", cpu_model{}, micro_kernel{};
  int64_t gpu_clock_mhz = 0, gpu_memory_bytes = 0;  ///< highest clock, whole memory; 0 on the CPU
  std::string commit{}, libtorch_version{}, pyractl_version{};
  std::string dtype{};  ///< as resolved: "fp32", "bf16"
  int64_t threads = 0;  ///< as resolved
};

/// One configuration. Times are milliseconds per iteration, an iteration is one batch.
struct BenchRow {
  std::string
      name{};  ///< infer|throughput|train|e2e/<arch>[@resolution]/<merge>-<schedule>|dense[+peft]/<device>/<dtype>/b<batch>
  int64_t batch = 1;
  int64_t iterations = 0;                   ///< in each repetition
  std::vector<double> real_ms{}, cpu_ms{};  ///< one entry a repetition, in the order taken; cpu: all threads together
  int64_t macs = 0;                         ///< multiply-adds of one image's forward pass
  int64_t params = 0;
  std::optional<int64_t> trained_params{};  ///< training rows
  int64_t peak_memory_bytes = 0;            ///< what BenchReport::peak_memory says
  bool slower_than_dense = false;
  /// Where a pass spends its time, if asked for and on a GPU; of an e2e row always, a stage each (bench_end_to_end.h).
  std::vector<engine::Stage> profile{};
  std::vector<double> latency_ms{};  ///< e2e: of batches, from the first file read to the labels
};

struct BenchReport {
  BenchSettings settings;
  BenchMachine machine;
  std::string peak_memory{};         ///< what peak_memory_bytes means on this machine
  std::vector<double> control_ms{};  ///< a fixed piece of work, once a round: how fast the machine itself was
  std::vector<BenchRow> rows{};
};

/// The row of the dense model beside a merged one: the name with its merge replaced. A dense row's is its own name.
/// "" for a name that is none of ours.
[[nodiscard]] std::string dense_name(const std::string& row_name);

/// Google Benchmark's schema: every repetition as an iteration row, then median (with relative_spread, bench_stats.h),
/// mean, stddev and cv. Numbers that are not finite become null.
[[nodiscard]] nlohmann::json to_json(const BenchReport& report);

/// Reads what to_json wrote. Error(input), which opens with `where`, names the key that is missing or wrong.
[[nodiscard]] BenchReport report_from_json(const nlohmann::json& document, const std::string& where);

/// The same from a file, at most 64 MiB; Error(input) naming it.
[[nodiscard]] BenchReport read_report(const std::filesystem::path& path);

}  // namespace pyra::tasks
