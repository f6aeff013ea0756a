// Runs side by side: results, curves, accuracy against speed, and all of it as one page that needs nothing else.
#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/progress.h"
#include "tasks/predictions.h"
#include "tasks/run_record.h"

namespace pyra::tasks {

/// Which of a run's two speeds is compared.
enum class Speed {
  inference,  ///< of its last evaluation: decoded images through the model as it was trained, adapter included
  training,   ///< over its training steps
};

struct ReportOptions {
  std::vector<std::filesystem::path> runs{};
  std::filesystem::path out{};  ///< the page; empty: none
  bool pareto = false;          ///< groups runs that differ in nothing but the seed, and marks each chart's front
  bool skip_bad = false;        ///< else the first bad run is an error
  Speed speed = Speed::inference;
  std::vector<std::filesystem::path> predictions{};  ///< files of `eval --predictions`
};

struct Spread {
  double mean = 0;
  std::optional<double> deviation{};  ///< of a sample (n - 1); none for a single value
};

/// A point in the comparison: one run, or all that differ in nothing but the seed.
struct ReportEntry {
  std::string name;          ///< the run's, or "lora, pyra-high", with what else tells it from others of that name
  std::vector<size_t> runs;  ///< indices into Report::runs
  Spread accuracy{}, images_per_second{};
  bool front = false;  ///< no other entry of its board is at least as good in both and better in one
};

/// What may be compared: one data set and split, one protocol, one device.
struct ReportBoard {
  std::string caption;
  std::vector<ReportEntry> entries;  ///< by descending accuracy
};

struct Report {
  bool grouped = false;
  Speed speed = Speed::inference;
  std::vector<RunRecord> runs{};
  std::vector<std::pair<std::filesystem::path, std::string>> left_out{};  ///< bad runs and why
  std::vector<ReportBoard> boards{};
  std::vector<Confusion> confusions{};
  std::vector<std::string> classes{};  ///< what all runs call their classes; empty where they differ
};

/// Most runs of one page.
inline constexpr size_t kMaxReportRuns = 2000;

/// Reads the runs and the predictions, and writes the page (atomically) where one is asked for. The same files give
/// the same bytes. Errors: usage for no run, too many, or one given twice; input for a bad run or predictions file, and
/// with skip_bad when every run is bad; output.
[[nodiscard]] Report report(const ReportOptions& options, Progress& progress = silent_progress());

/// Puts runs into boards, and in a board into entries (Report::grouped) with their fronts.
[[nodiscard]] std::vector<ReportBoard> compare_runs(const std::vector<RunRecord>& runs, bool grouped, Speed speed);

[[nodiscard]] std::string to_json(const Report& report);
/// The page: HTML with inline SVG and CSS, no script, nothing from elsewhere, everything from files escaped.
[[nodiscard]] std::string to_html(const Report& report);

/// "lora, pyra-high": PEFT method and merger with its schedule.
[[nodiscard]] std::string method_of(const FinetuneReport& result);
[[nodiscard]] double images_per_second(const FinetuneReport& result, Speed speed);

}  // namespace pyra::tasks
