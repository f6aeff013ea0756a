// pyractl report: a page on one run or many.
#include "tasks/report.h"

#include <algorithm>
#include <iomanip>

#include "base/error.h"
#include "base/text.h"
#include "command.h"

namespace pyra::cli {
namespace {

std::string with_deviation(const tasks::Spread& spread, double scale, int digits) {
  std::string text = cat(std::fixed, std::setprecision(digits), scale * spread.mean);
  if (spread.deviation) text += cat(" ± ", std::fixed, std::setprecision(digits), scale * *spread.deviation);
  return text;
}

void print_board(std::ostream& out, const tasks::ReportBoard& board) {
  out << board.caption << "\n";
  size_t width = 0;
  for (const tasks::ReportEntry& entry : board.entries) width = std::max(width, entry.name.size());
  for (const tasks::ReportEntry& entry : board.entries) {
    out << "  " << (entry.front ? "* " : "  ") << std::left << std::setw(int(width)) << entry.name << "  "
        << with_deviation(entry.accuracy, 100, 2) << " %  " << with_deviation(entry.images_per_second, 1, 1)
        << " images/s";
    if (entry.runs.size() > 1) out << "  (" << entry.runs.size() << " runs)";
    out << "\n";
  }
}

void print_human(std::ostream& out, const tasks::ReportOptions& options, const tasks::Report& report) {
  for (const tasks::ReportBoard& board : report.boards) print_board(out, board);
  for (const tasks::Confusion& confusion : report.confusions)
    out << confusion.file.string() << ": " << confusion.correct << " of " << confusion.images << " correct\n";
  for (const auto& [folder, reason] : report.left_out) out << "left out: " << folder.string() << ": " << reason << "\n";
  if (!options.out.empty()) out << "page      " << options.out.string() << " (* on the Pareto front)\n";
}

void add_options(CLI::App& command, tasks::ReportOptions& options, std::string& speed) {
  command.add_option("RUN", options.runs, "Run folders of `pyractl finetune`")->required()->type_name("");
  command.add_option("--out", options.out, "The page to write (.html); with --json it may be left out")
      ->type_name("FILE");
  command.add_flag("--pareto", options.pareto,
                   "Group runs that differ only in the seed: means with deviations, and the front of the means");
  command.add_option("--speed", speed, "The speed to compare: of the last evaluation, or of training")
      ->check(CLI::IsMember({"inference", "training"}).description(""))
      ->type_name("inference|training")
      ->capture_default_str();
  command.add_option("--predictions", options.predictions, "CSV of `eval --predictions`: confusion matrix; repeatable")
      ->type_name("FILE")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command.add_flag("--skip-bad", options.skip_bad, "List runs that are unfinished or damaged and leave them out");
}

}  // namespace

void add_report(CLI::App& root, Session& session) {
  CLI::App* command = add_command(root, session, "report", "A page on runs: curves, results, accuracy against speed");
  const auto options = std::make_shared<tasks::ReportOptions>();
  const auto speed = std::make_shared<std::string>("inference");
  add_options(*command, *options, *speed);
  command->footer(R"(
One HTML file that needs nothing else: no script, no network. Runs are compared only where data, split, protocol and
device are the same.

Examples:
  pyractl report runs/first --out first.html
  pyractl report runs/dense runs/pyra --out both.html --predictions pyra.csv
  pyractl report runs/* --pareto --skip-bad --out all.html --json)");
  command->callback([&session, options, speed] {
    session.action = [&session, options, speed] {
      if (options->out.empty() && !session.globals.json) {
        fail(ExitCode::usage, "no page to write: give --out FILE, or --json for the figures alone");
      }
      options->speed = *speed == "training" ? tasks::Speed::training : tasks::Speed::inference;
      const tasks::Report report = tasks::report(*options, session.progress());
      auto document = nlohmann::json::parse(tasks::to_json(report));
      if (!options->out.empty()) document["out"] = options->out.string();
      session.print(document, [&](std::ostream& out) { print_human(out, *options, report); });
      return 0;
    };
  });
}

}  // namespace pyra::cli
