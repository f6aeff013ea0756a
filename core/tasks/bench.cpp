#include "tasks/bench.h"

#include <ATen/Parallel.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>

#include "base/clock.h"
#include "tasks/assemble.h"
#include "tasks/bench_machine.h"
#include "tasks/bench_stats.h"
#include "tasks/bench_subject.h"
#include "tasks/machine.h"
#include "tasks/run_model.h"

namespace pyra::tasks {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kMinRounds = 9, kMaxRounds = 40;  // where the noise decides how many
constexpr int64_t kMinSlowRounds = 3;               // where they take long: with fewer there is no noise to speak of
constexpr double kTargetNoise = 0.01;
constexpr double kTail = 0.005;
constexpr double kStableWithin = 0.03;
constexpr double kWarmUpSeconds = 2;
constexpr double kMaxControlSeconds = 0.25;

double process_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// Seconds of an iteration once it has its pace: when three in a row are no faster than the best before them by more
// than kStableWithin, or when warming up takes too long.
double warm_up(const BenchSubject& subject, int64_t iterations) {
  const auto start = Clock::now();
  const auto timed = [&] { return 1e-3 * subject.time_ms(1); };
  double best = timed();
  for (int64_t done = 1, steady = 0; iterations > 0 ? done < iterations : steady < 3; ++done) {
    if (iterations == 0 && seconds_since(start) > kWarmUpSeconds) break;
    const double seconds = timed();
    steady = seconds < best * (1 - kStableWithin) ? 0 : steady + 1;
    best = std::min(best, seconds);
  }
  return best;
}

void repeat_once(BenchSubject& subject) {
  BenchRow& row = subject.row;
  const double cpu = process_seconds();
  row.real_ms.push_back(subject.time_ms(row.iterations) / double(row.iterations));
  row.cpu_ms.push_back((process_seconds() - cpu) * 1e3 / double(row.iterations));
}

bool enough(const std::vector<BenchSubject>& subjects, const BenchSettings& settings, int64_t rounds, double seconds) {
  if (settings.repetitions > 0) return rounds >= settings.repetitions;
  if (rounds >= kMaxRounds || (rounds >= kMinSlowRounds && seconds > settings.max_time)) return true;
  return rounds >= kMinRounds && std::all_of(subjects.begin(), subjects.end(), [&](const BenchSubject& subject) {
           return estimate_log(subject.row.real_ms, kTail / double(subjects.size())).noise < kTargetNoise;
         });
}

// Gives every row its pace and its memory peak; the seconds of the longest repetition.
double warm_up_all(std::vector<BenchSubject>& subjects, const BenchSettings& settings, const PeakMemory& memory,
                   Progress& progress) {
  double longest = 0;
  progress.begin("warm up", int64_t(subjects.size()), "row");
  for (size_t i = 0; i < subjects.size(); ++i) {
    BenchRow& row = subjects[i].row;
    memory.reset();
    const double seconds = warm_up(subjects[i], settings.warmup);
    if (subjects[i].warmed) subjects[i].warmed();
    row.peak_memory_bytes = subjects[i].device_bytes ? subjects[i].device_bytes() : PeakMemory::bytes();
    row.iterations = std::max<int64_t>(1, int64_t(std::ceil(settings.min_time / seconds)));
    longest = std::max(longest, seconds * double(row.iterations));
    progress.update(int64_t(i) + 1, row.name);
    stop_if_asked("bench");
  }
  progress.end();
  return longest;
}

// Every row once a round, until there are enough; the control work's times.
std::vector<double> measure_rounds(std::vector<BenchSubject>& subjects, const BenchSettings& settings, double longest,
                                   Progress& progress) {
  ControlWork control;
  // As long as a repetition: a shorter piece of work would slip through between two turns of a neighbour's.
  const double control_seconds = std::min(longest, kMaxControlSeconds);
  std::vector<double> control_ms;
  const auto start = Clock::now();
  progress.begin("measure", settings.repetitions, "round");
  for (int64_t round = 0; !enough(subjects, settings, round, seconds_since(start)); ++round) {
    control_ms.push_back(control.measure_ms(control_seconds));
    for (BenchSubject& subject : subjects) {
      repeat_once(subject);
      stop_if_asked("bench");
    }
    progress.update(round + 1);
  }
  progress.end();
  return control_ms;
}

void mark_slower_than_dense(std::vector<BenchRow>& rows) {
  std::map<std::string, double> medians;
  for (const BenchRow& row : rows) medians[row.name] = median(row.real_ms);
  for (BenchRow& row : rows) {
    const auto dense = medians.find(dense_name(row.name));
    row.slower_than_dense = dense != medians.end() && medians[row.name] > dense->second;
  }
}

void check(const BenchSettings& settings) {
  if (settings.model.empty() == settings.arch.empty()) fail(ExitCode::usage, "name either a model file or --arch");
  if (settings.merge.empty() != settings.schedule.empty())
    fail(ExitCode::usage, "--merge and --schedule go together: --merge tome --schedule high");
  for (const std::string& mode : settings.modes)
    if (std::ranges::find(kBenchModes, mode) == kBenchModes.end())
      fail(ExitCode::usage, "bench: mode '", mode, "', expected infer, throughput, train or e2e");
  const bool end_to_end = std::find(settings.modes.begin(), settings.modes.end(), "e2e") != settings.modes.end();
  if (end_to_end == settings.data.empty())
    fail(ExitCode::usage, "bench: --end-to-end and --data go together: files to read, and what to do with them");
  for (const int64_t batch : settings.batches)
    if (batch < 1 || batch > kMaxBenchBatch)
      fail(ExitCode::usage, "bench: batch ", batch, ", expected 1 to ", kMaxBenchBatch);
  if (settings.modes.empty() || settings.batches.empty()) fail(ExitCode::usage, "bench: no mode or no batch size");
}

// The same configurations measured again: one result with the repetitions of both.
BenchReport pooled(BenchReport first, const BenchReport& second) {
  first.control_ms.insert(first.control_ms.end(), second.control_ms.begin(), second.control_ms.end());
  for (size_t i = 0; i < first.rows.size(); ++i) {
    const BenchRow& more = second.rows.at(i);
    first.rows[i].real_ms.insert(first.rows[i].real_ms.end(), more.real_ms.begin(), more.real_ms.end());
    first.rows[i].cpu_ms.insert(first.rows[i].cpu_ms.end(), more.cpu_ms.begin(), more.cpu_ms.end());
  }
  return first;
}

}  // namespace

std::string resolve_bench_device(const BenchSettings& settings) {
  return resolve_device(settings.device);
}

BenchReport run_bench(const BenchSettings& asked, const host::PluginRegistry& plugins, Progress& progress) {
  check(asked);
  if (asked.threads > 0) set_threads(int(asked.threads));
  BenchReport report{.settings = asked, .machine = describe_bench_machine()};
  report.settings.device = resolve_bench_device(asked);
  report.settings.dtype = engine::precision_name(resolve_precision(asked.dtype, report.settings.device));
  report.machine.dtype = report.settings.dtype;
  describe_device(report.settings.device, report.machine);
  report.settings.threads = report.machine.threads = at::get_num_threads();
  const BenchSettings& settings = report.settings;
  const PeakMemory memory;
  const bool on_gpu = settings.device != "cpu";
  report.peak_memory =
      on_gpu ? "device memory that the engine plans for the row: weights and activations" : memory.meaning();

  std::vector<BenchSubject> subjects = make_subjects(settings, plugins);
  const double longest = warm_up_all(subjects, settings, memory, progress);
  std::vector<double> control_ms = measure_rounds(subjects, settings, longest, progress);
  if (!on_gpu) report.control_ms = std::move(control_ms);  // how fast the CPU is says nothing of a GPU
  for (BenchSubject& subject : subjects) {
    if (subject.profile) subject.row.profile = subject.profile();
    if (subject.latency_ms) subject.row.latency_ms = subject.latency_ms();
    report.rows.push_back(std::move(subject.row));
  }
  mark_slower_than_dense(report.rows);
  return report;
}

Comparison compare_now(const BenchReport& base, const BenchSettings& settings, const host::PluginRegistry& plugins,
                       const CompareOptions& options, Progress& progress) {
  const BenchReport first = run_bench(settings, plugins, progress);
  const Comparison verdict = compare(base, first, options);
  if (verdict.exit_code() == ExitCode::ok) return verdict;
  progress.note("not settled at the first look: measuring once more");
  return compare(base, pooled(first, run_bench(settings, plugins, progress)), options);
}

BenchSettings settings_of(const BenchReport& base) {
  BenchSettings settings = base.settings;
  settings.dtype = base.machine.dtype;
  settings.threads = base.machine.threads;
  settings.device = base.settings.device;
  return settings;
}

}  // namespace pyra::tasks
