#include "tasks/report.h"

#include <set>

#include "base/error.h"
#include "io/atomic_file.h"
#include "io/json.h"
#include "io/output_path.h"
#include "tasks/run_folder.h"
#include "tasks/run_model.h"

namespace pyra::tasks {
namespace fs = std::filesystem;
namespace {

void check_options(const ReportOptions& options) {
  if (options.runs.empty()) fail(ExitCode::usage, "no run folder to report on");
  if (options.runs.size() > kMaxReportRuns) {
    fail(ExitCode::usage, options.runs.size(), " runs; a page takes at most ", kMaxReportRuns);
  }
  std::set<fs::path> seen;
  for (const fs::path& run : options.runs) {
    std::error_code error;
    const fs::path whole = fs::weakly_canonical(run, error);
    if (!error && !seen.insert(whole).second) fail(ExitCode::usage, run.string(), ": is given twice");
  }
}

void read_runs(const ReportOptions& options, Report& report, Progress& progress) {
  progress.begin("report", int64_t(options.runs.size()), "runs");
  for (const fs::path& folder : options.runs) {
    stop_if_asked("report");
    try {
      report.runs.push_back(read_run(folder));
    } catch (const Error& error) {
      if (error.code() != ExitCode::input) throw;
      if (!options.skip_bad) fail(ExitCode::input, error.what(), "; --skip-bad leaves such runs out");
      report.left_out.emplace_back(folder, error.what());
    }
    progress.update(int64_t(report.runs.size() + report.left_out.size()));
  }
  progress.end();
  if (report.runs.empty()) {
    fail(ExitCode::input, "none of the ", options.runs.size(),
         " runs can be read; the first: ", report.left_out.front().second);
  }
}

/// Folders of one name are told apart by the paths that were given.
void name_runs(std::vector<RunRecord>& runs) {
  std::map<std::string, int> uses;
  for (const RunRecord& run : runs) ++uses[run.name];
  for (RunRecord& run : runs) {
    if (uses[run.name] > 1 || run.name.empty()) run.name = run.folder.string();
  }
}

std::vector<std::string> common_classes(const std::vector<RunRecord>& runs) {
  for (const RunRecord& run : runs) {
    if (run.classes != runs.front().classes) return {};
  }
  return runs.front().classes;
}

nlohmann::json to_json(const Spread& spread) {
  return {{"mean", spread.mean},
          {"deviation", spread.deviation ? nlohmann::json(*spread.deviation) : nlohmann::json(nullptr)}};
}

nlohmann::json to_json(const Confusion& confusion, const std::vector<std::string>& names) {
  nlohmann::json classes = nlohmann::json::array(), counts = nlohmann::json::array();
  const std::vector<ClassResult> results = class_results(confusion);
  for (size_t label = 0; label < results.size(); ++label) {
    if (results[label].images == 0) continue;
    nlohmann::json entry{{"label", label}, {"images", results[label].images}, {"correct", results[label].correct}};
    if (label < names.size()) entry["class"] = names[label];
    classes.push_back(entry);
  }
  for (const auto& [place, images] : confusion.counts)
    counts.push_back({{"label", place.first}, {"predicted", place.second}, {"images", images}});
  return {{"file", confusion.file.string()},
          {"images", confusion.images},
          {"correct", confusion.correct},
          {"classes", classes},
          {"confusion", counts}};
}

nlohmann::json to_json(const ReportBoard& board, const Report& report) {
  nlohmann::json entries = nlohmann::json::array();
  for (const ReportEntry& entry : board.entries) {
    nlohmann::json runs = nlohmann::json::array(), seeds = nlohmann::json::array();
    for (const size_t run : entry.runs) {
      runs.push_back(report.runs[run].folder.string());
      seeds.push_back(report.runs[run].result.seed);
    }
    entries.push_back({{"name", entry.name},
                       {"runs", runs},
                       {"seeds", seeds},
                       {"accuracy", to_json(entry.accuracy)},
                       {"images_per_second", to_json(entry.images_per_second)},
                       {"pareto", entry.front}});
  }
  return {{"comparable", board.caption}, {"entries", entries}};
}

}  // namespace

std::string method_of(const FinetuneReport& result) {
  return result.peft + ", " + result.merge;
}

double images_per_second(const FinetuneReport& result, Speed speed) {
  return speed == Speed::inference ? result.eval_images_per_second : result.images_per_second;
}

Report report(const ReportOptions& options, Progress& progress) {
  check_options(options);
  io::keep_inputs(options.out, options.predictions);
  for (const fs::path& run : options.runs) io::keep_inputs(options.out, RunFolder{run}.contents());
  Report report{.grouped = options.pareto, .speed = options.speed};
  read_runs(options, report, progress);
  name_runs(report.runs);
  report.boards = compare_runs(report.runs, options.pareto, options.speed);
  report.classes = common_classes(report.runs);
  for (const fs::path& file : options.predictions)
    report.confusions.push_back(read_predictions(file, int64_t(report.classes.size())));
  if (!options.out.empty()) io::write_file(options.out, to_html(report));
  return report;
}

std::string to_json(const Report& report) {
  nlohmann::json runs = nlohmann::json::array(), left_out = nlohmann::json::array(), boards = nlohmann::json::array(),
                 predictions = nlohmann::json::array();
  for (const RunRecord& run : report.runs) {
    nlohmann::json entry = nlohmann::json::parse(to_json(run.result));
    entry["run"] = run.folder.string();
    entry["name"] = run.name;
    runs.push_back(entry);
  }
  for (const auto& [folder, reason] : report.left_out)
    left_out.push_back({{"run", folder.string()}, {"reason", reason}});
  for (const ReportBoard& board : report.boards) boards.push_back(to_json(board, report));
  for (const Confusion& confusion : report.confusions) predictions.push_back(to_json(confusion, report.classes));
  return nlohmann::json{{"runs", runs},
                        {"left_out", left_out},
                        {"grouped", report.grouped},
                        {"speed", report.speed == Speed::inference ? "inference" : "training"},
                        {"boards", boards},
                        {"predictions", predictions}}
      .dump(2, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace pyra::tasks
