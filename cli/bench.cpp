// pyractl bench: how fast a model is, dense and merged side by side, and whether it became slower.
#include "tasks/bench.h"

#include <algorithm>
#include <cmath>
#include <iomanip>

#include "base/text.h"
#include "command.h"
#include "tasks/bench_against.h"
#include "tasks/bench_stats.h"

namespace pyra::cli {
namespace {

struct BenchCommand {
  tasks::BenchSettings settings;
  std::vector<std::string> compare;  // BASE [NEW]
  std::filesystem::path against;
  int64_t pairs = 9;
  std::string max_regress = "3%";
  bool ratio_only = false, allow_missing = false;
};

// Enough digits to read, not more: 1234, 123, 12.3, 1.23.
std::string rate(double value) {
  return fixed(value, value >= 100 ? 0 : value >= 10 ? 1 : 2);
}

std::string percent(double value, bool sign) {
  return (sign && value >= 0 ? "+" : "") + fixed(100 * value, 1) + "%";
}

// A table whose first column is text and the others numbers.
void print_table(std::ostream& out, const std::vector<std::vector<std::string>>& lines) {
  std::vector<size_t> widths;
  for (const auto& line : lines) {
    widths.resize(std::max(widths.size(), line.size()));
    for (size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  }
  for (const auto& line : lines) {
    out << std::left << std::setw(int(widths[0])) << line[0] << std::right;
    for (size_t i = 1; i < line.size(); ++i) out << "  " << std::setw(int(widths[i])) << line[i];
    out << "\n";
  }
}

/// The way of a batch of files: throughput stands in the table, this is what it is made of.
void print_end_to_end(std::ostream& out, const tasks::BenchRow& row, int64_t threads) {
  out << row.name << ": latency of a batch " << rate(tasks::quantile(row.latency_ms, 0.5)) << " ms (half of them), "
      << rate(tasks::quantile(row.latency_ms, 0.99)) << " ms (99%)\n";
  std::vector<std::vector<std::string>> lines{{"  stage", "ms a batch", "of one thread", "images/s it allows"}};
  for (const engine::Stage& stage : row.profile) {
    // Files are decoded on all threads; the engine's time is of them all already.
    const bool of_one_thread = stage.name != "compute";
    const double ms = of_one_thread ? stage.ms / double(threads) : stage.ms;
    lines.push_back(
        {"  " + stage.name, rate(ms), of_one_thread ? rate(stage.ms) + " ms" : "", rate(1e3 * double(row.batch) / ms)});
  }
  print_table(out, lines);
}

void print_profile(std::ostream& out, const tasks::BenchRow& row) {
  if (row.profile.empty()) return;
  double all = 0;
  for (const engine::Stage& stage : row.profile) all += stage.ms;
  std::vector<std::vector<std::string>> lines{
      {row.name + ", each step alone", "calls", "us", "share", "GB/s", "TFLOP/s"}};
  for (const engine::Stage& stage : row.profile)
    lines.push_back({"  " + stage.name, std::to_string(stage.calls), rate(stage.ms * 1e3),
                     percent(stage.ms / all, false), rate(stage.bytes / stage.ms * 1e-6),
                     stage.operations > 0 ? rate(stage.operations / stage.ms * 1e-9) : ""});
  print_table(out, lines);
}

void print_report(std::ostream& out, const tasks::BenchReport& report) {
  const tasks::BenchMachine& machine = report.machine;
  if (machine.device == "cpu")
    out << machine.cpu_model << ", " << machine.threads << " threads, " << machine.micro_kernel << " kernels";
  else
    out << machine.device << ", driver " << machine.driver;
  out << ", LibTorch " << machine.libtorch_version << ", pyractl " << machine.pyractl_version << " (" << machine.commit
      << ")\n";
  std::vector<std::vector<std::string>> lines{{"row", "images/s", "spread", "ms", "MACs", "speed-up", "peak MiB"}};
  bool slower = false;
  for (const tasks::BenchRow& row : report.rows) {
    const double ms = tasks::median(row.real_ms);
    std::string speed_up;
    for (const tasks::BenchRow& dense : report.rows)
      if (dense.name == tasks::dense_name(row.name) && dense.name != row.name)
        speed_up = fixed(tasks::median(dense.real_ms) / ms, 2) + "x";
    const std::string spread = row.real_ms.size() < 3 ? "?" : percent(tasks::relative_spread(row.real_ms), false);
    lines.push_back({row.name, rate(1e3 * double(row.batch) / ms), spread, rate(ms), grouped(row.macs), speed_up,
                     grouped(row.peak_memory_bytes >> 20)});
    if (row.slower_than_dense) lines.back().push_back("SLOWER THAN DENSE");
    slower |= row.slower_than_dense;
  }
  print_table(out, lines);
  for (const tasks::BenchRow& row : report.rows)
    row.latency_ms.empty() ? print_profile(out, row) : print_end_to_end(out, row, machine.threads);
  out << "medians of " << report.rows.front().real_ms.size() << " interleaved repetitions; MACs of one image\n";
  if (slower) out << "A merge that is slower than the dense model costs accuracy and buys nothing here.\n";
}

void print_comparison(std::ostream& out, const tasks::Comparison& comparison) {
  const bool ratio = comparison.kind == "ratio";
  std::vector<std::vector<std::string>> lines{
      {"row", ratio ? "base" : "base ms", ratio ? "now" : "now ms", "change", "noise", "verdict"}};
  for (const tasks::RowComparison& row : comparison.rows)
    lines.push_back({row.name, fixed(row.base, ratio ? 4 : 2), fixed(row.now, ratio ? 4 : 2), percent(row.change, true),
                     percent(row.noise, false), tasks::verdict_name(row.verdict)});
  print_table(out, lines);
  for (const std::string& note : comparison.notes) out << note << "\n";
  switch (comparison.exit_code()) {
    case ExitCode::regression:
      out << "SLOW: more than " << percent(comparison.max_regress, false) << " slower, and more than noise explains.\n";
      break;
    case ExitCode::inconclusive:
      out << "UNKNOWN: the noise could hide a regression of " << percent(comparison.max_regress, false)
          << "; measure on a quieter machine, longer (--repetitions, --min-time), or with --against.\n";
      break;
    default:
      out << "No row is more than " << percent(comparison.max_regress, false) << " slower.\n";
  }
}

int finish(Session& session, const tasks::Comparison& comparison) {
  session.print(tasks::to_json(comparison), [&](std::ostream& out) { print_comparison(out, comparison); });
  return int(comparison.exit_code());
}

// What was asked for on the command line goes before what the base says.
tasks::BenchSettings settings_now(const tasks::BenchReport& base, const BenchCommand& options, const CLI::App& command,
                                  const Globals& globals) {
  tasks::BenchSettings settings = tasks::settings_of(base);
  const tasks::BenchSettings& given = options.settings;
  if (!given.model.empty() || !given.arch.empty()) settings.model = given.model, settings.arch = given.arch;
  if (command.count("--merge") + command.count("--schedule") > 0)
    settings.merge = given.merge, settings.schedule = given.schedule;
  if (command.count("--peft") > 0) settings.peft = given.peft;
  if (command.count("--mode") + command.count("--end-to-end") > 0)
    settings.modes = given.modes, settings.data = given.data;
  if (command.count("--data") > 0) settings.data = given.data;
  if (command.count("--split") > 0) settings.split = given.split;
  if (command.count("--batch") > 0) settings.batches = given.batches;
  if (command.count("--repetitions") > 0) settings.repetitions = given.repetitions;
  if (command.count("--min-time") > 0) settings.min_time = given.min_time;
  if (command.count("--max-time") > 0) settings.max_time = given.max_time;
  if (command.count("--warmup") > 0) settings.warmup = given.warmup;
  if (globals.device != "auto") settings.device = globals.device;
  if (globals.dtype != "auto") settings.dtype = globals.dtype;
  if (globals.threads > 0) settings.threads = globals.threads;
  if (!globals.set.empty()) settings.set = globals.set;
  return settings;
}

int compare_files_or_now(Session& session, const BenchCommand& options, const CLI::App& command,
                         const tasks::CompareOptions& rule) {
  const tasks::BenchReport base = tasks::read_report(options.compare[0]);
  if (options.compare.size() == 2)
    return finish(session, tasks::compare(base, tasks::read_report(options.compare[1]), rule));
  const tasks::BenchSettings settings = settings_now(base, options, command, session.globals);
  return finish(session, tasks::compare_now(base, settings, session.plugins(), rule, session.progress()));
}

int run(Session& session, const BenchCommand& options, const CLI::App& command) {
  const tasks::CompareOptions rule{.max_regress = tasks::parse_max_regress(options.max_regress),
                                   .ratio_only = options.ratio_only,
                                   .allow_missing = options.allow_missing};
  if (!options.compare.empty()) return compare_files_or_now(session, options, command, rule);
  tasks::BenchSettings settings = options.settings;
  settings.device = session.globals.device;
  settings.dtype = session.globals.dtype;
  settings.threads = session.globals.threads;
  settings.set = session.globals.set;
  if (!options.against.empty()) {
    const tasks::AgainstOptions against{
        .other = options.against, .plugin_path = session.globals.plugin_path, .pairs = options.pairs};
    return finish(session, tasks::compare_against(against, settings, rule, session.progress()));
  }
  const tasks::BenchReport report = tasks::run_bench(settings, session.plugins(), session.progress());
  session.print(tasks::to_json(report), [&](std::ostream& out) { print_report(out, report); });
  return 0;
}

void add_what(CLI::App& command, tasks::BenchSettings& settings) {
  command.add_option("MODEL", settings.model, "Model file (.safetensors)")->type_name("");
  command.add_option("--arch", settings.arch, "timm's name, with random weights: timing needs no file")
      ->type_name("NAME");
  command.add_option("--merge", settings.merge, "Merger to measure beside the dense model (default: the file's)")
      ->type_name("NAME");
  command.add_option("--schedule", settings.schedule, "low, high, N, N@INFLECTION, a,b,c,... or file.toml")
      ->type_name("S");
  command.add_option("--peft", settings.peft, "PEFT method of training rows")->type_name("NAME")->capture_default_str();
  command
      .add_option(
          "--mode", settings.modes,
          "infer (one batch after another), throughput (several in flight, as eval runs; on the CPU the same), train")
      ->delimiter(',')
      ->type_name("M,...")
      ->check(CLI::IsMember({"infer", "throughput", "train"}))
      ->capture_default_str();
  command.add_flag_callback(
      "--end-to-end", [&settings] { settings.modes = {"e2e"}; },
      "From image files to labels: throughput, latency, and what each stage takes");
  command.add_option("--data", settings.data, "With --end-to-end: the files (folder or .tar)")->type_name("D");
  command.add_option("--split", settings.split, "... and their split")->type_name("NAME")->capture_default_str();
  command.add_option("--batch", settings.batches, "Images at once, a row each")
      ->delimiter(',')
      ->type_name("N,...")
      ->check(CLI::Range(int64_t{1}, tasks::kMaxBenchBatch))
      ->capture_default_str();
}

void add_how(CLI::App& command, tasks::BenchSettings& settings) {
  command
      .add_option(
          "--repetitions", settings.repetitions,
          "Rounds over all rows (default: 9 to 40, until the noise is below 1%; from 3 on --max-time ends them)")
      ->type_name("N")
      ->check(CLI::Range(1, 10000));
  command.add_option("--min-time", settings.min_time, "Seconds that a repetition lasts at least")
      ->type_name("S")
      ->check(CLI::Range(1e-3, 3600.0))
      ->capture_default_str();
  command.add_option("--max-time", settings.max_time, "Seconds of rounds in all, unless --repetitions says how many")
      ->type_name("S")
      ->check(CLI::Range(1e-3, 86400.0))
      ->capture_default_str();
  command.add_flag("--profile", settings.profile, "On a GPU: where a forward pass spends its time, step by step");
  command
      .add_option("--warmup", settings.warmup, "Iterations of each row before the first round (default: until stable)")
      ->type_name("N")
      ->check(CLI::Range(1, 10000));
}

void add_comparison(CLI::App& command, BenchCommand& options) {
  CLI::Option* compare =
      command.add_option("--compare", options.compare, "Compare with a result of `bench --json`: NEW, or measured now")
          ->expected(1, 2)
          ->type_name("BASE.json [NEW.json]");
  command.add_option("--against", options.against, "Compare with another pyractl, run in turn with this one")
      ->type_name("PYRACTL")
      ->excludes(compare);
  command.add_option("--pairs", options.pairs, "Pairs of runs with --against")
      ->type_name("N")
      ->check(CLI::Range(3, 1000))
      ->capture_default_str();
  command.add_option("--max-regress", options.max_regress, "How much longer a row may take")
      ->type_name("P%")
      ->capture_default_str();
  command.add_flag("--ratio-only", options.ratio_only,
                   "Compare merged over dense instead of times: for CI machines that change");
  command.add_flag("--allow-missing", options.allow_missing, "Rows of the base may be missing");
}

}  // namespace

void add_bench(CLI::App& root, Session& session) {
  CLI::App* command = add_command(root, session, "bench", "Measure speed, dense and merged; find regressions");
  const auto options = std::make_shared<BenchCommand>();
  add_what(*command, options->settings);
  add_how(*command, options->settings);
  add_comparison(*command, *options);
  command->footer(R"(
--json prints Google Benchmark's format. A comparison exits with 5 when a row is slower by more than --max-regress and
by more than the noise, with 8 when the noise could hide that; another machine, dtype or missing rows are refused (2).

Examples:
  pyractl bench vit.safetensors --merge tome --schedule high --batch 1,32
  pyractl bench --arch vit_base_patch16_224 --merge pyra --schedule high --mode train
  pyractl bench --arch vit_tiny_patch16_224 --merge tome --schedule high --json > base.json
  pyractl bench --compare base.json --max-regress 3%
  pyractl bench vit.safetensors --end-to-end --data task.tar --batch 1,32
  pyractl bench --arch vit_tiny_patch16_224 --against /opt/pyra-1.0/bin/pyractl)");
  command->callback([&session, options, command] {
    session.action = [&session, options, command] { return run(session, *options, *command); };
  });
}

}  // namespace pyra::cli
