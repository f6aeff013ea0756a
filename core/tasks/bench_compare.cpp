#include "tasks/bench_compare.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <span>

#include "base/text.h"
#include "tasks/bench_stats.h"

namespace pyra::tasks {
namespace {

// One false alarm in 200 comparisons of equal programs, over all rows of a comparison together.
constexpr double kFalseAlarms = 0.005;

using Rows = std::map<std::string, const BenchRow*>;

Rows rows_by_name(const BenchReport& report) {
  Rows rows;
  for (const BenchRow& row : report.rows) rows[row.name] = &row;
  return rows;
}

struct Difference {
  double base = 0, now = 0;  // medians
  double log_ratio = 0, noise = 0;
};

RowComparison judge(const std::string& name, const Difference& d, double max_regress) {
  const double threshold = std::log1p(max_regress);
  RowComparison row{.name = name, .base = d.base, .now = d.now};
  row.change = std::expm1(d.log_ratio);
  row.noise = std::expm1(d.noise);
  if (d.log_ratio > threshold && d.log_ratio > d.noise)
    row.verdict = Verdict::slow;
  else if (d.noise > threshold && d.log_ratio + d.noise > threshold)
    row.verdict = Verdict::inconclusive;
  else if (d.log_ratio < -threshold && d.log_ratio < -d.noise)
    row.verdict = Verdict::faster;
  return row;
}

// How much slower or faster the machine itself became, and how well that is known.
struct Drift {
  double log_ratio = 0, noise = 0;
};

Drift control_drift(const BenchReport& base, const BenchReport& now, double tail) {
  if (base.control_ms.empty() || now.control_ms.empty()) return {};
  const LogEstimate a = estimate_log(base.control_ms, tail), b = estimate_log(now.control_ms, tail);
  return {.log_ratio = b.log_median - a.log_median, .noise = std::hypot(a.noise, b.noise)};
}

Difference difference(std::span<const double> base, std::span<const double> now, const Drift& drift, double tail) {
  const LogEstimate a = estimate_log(base, tail), b = estimate_log(now, tail);
  return {.base = median(base),
          .now = median(now),
          .log_ratio = b.log_median - a.log_median,
          .noise = std::hypot(a.noise, b.noise, drift.noise) + std::abs(drift.log_ratio)};
}

void refuse_other_device(const BenchMachine& base, const BenchMachine& now) {
  const auto same = [](const char* what, const auto& was, const auto& is) {
    if (was == is) return;
    fail(ExitCode::usage, "bench --compare: another machine: ", what, " was '", was, "', is '", is,
         "'; measure a base on this one, or compare merged over dense with --ratio-only");
  };
  same("device", base.device, now.device);
  same("driver", base.driver, now.driver);
  same("cpu_model", base.cpu_model, now.cpu_model);
  same("threads", base.threads, now.threads);
  same("dtype", base.dtype, now.dtype);
}

// Repetitions of rows taken in one round stand beside one another, so what the machine did then cancels.
std::vector<double> round_ratios(const BenchRow& merged, const BenchRow& dense) {
  std::vector<double> ratios;
  for (size_t i = 0; i < std::min(merged.real_ms.size(), dense.real_ms.size()); ++i)
    ratios.push_back(merged.real_ms[i] / dense.real_ms[i]);
  return ratios;
}

// What is compared, by row name: times, or with ratio_only merged over dense.
std::map<std::string, std::vector<double>> quantities(const BenchReport& report, bool ratio_only) {
  const Rows rows = rows_by_name(report);
  std::map<std::string, std::vector<double>> found;
  for (const auto& [name, row] : rows) {
    if (!ratio_only) {
      found[name] = row->real_ms;
      continue;
    }
    const auto dense = rows.find(dense_name(name));
    if (dense != rows.end() && dense->first != name) found[name] = round_ratios(*row, *dense->second);
  }
  return found;
}

void note_changes(const BenchReport& base, const BenchReport& now, std::vector<std::string>& notes) {
  const auto changed = [&](const char* what, const std::string& was, const std::string& is) {
    if (was != is) notes.push_back(cat(what, " changed: ", was, " -> ", is));
  };
  changed("commit", base.machine.commit, now.machine.commit);
  changed("pyractl", base.machine.pyractl_version, now.machine.pyractl_version);
  changed("LibTorch", base.machine.libtorch_version, now.machine.libtorch_version);
  changed("build type", base.machine.library_build_type, now.machine.library_build_type);
  changed("micro-kernel", base.machine.micro_kernel, now.machine.micro_kernel);
}

// The names to compare, in the order of the base; complains or notes what only one side has.
template <class Quantities>
std::vector<std::string> common_names(const BenchReport& base, const Quantities& before, const Quantities& after,
                                      const CompareOptions& options, std::vector<std::string>& notes) {
  std::vector<std::string> common, missing;
  for (const BenchRow& row : base.rows) {
    if (!before.contains(row.name)) continue;
    (after.contains(row.name) ? common : missing).push_back(row.name);
  }
  for (const auto& [name, unused] : after)
    if (!before.contains(name)) notes.push_back(cat("new row, not compared: ", name));
  if (!missing.empty() && !options.allow_missing)
    fail(ExitCode::usage, "bench --compare: the new result lacks rows of the base: ", join(missing),
         "; measure them, or pass --allow-missing");
  for (const std::string& name : missing) notes.push_back(cat("row of the base is missing: ", name));
  if (common.empty())
    fail(ExitCode::usage, "bench --compare: nothing to compare: ",
         options.ratio_only ? "no merged row has its dense row in both results" : "no row stands in both results");
  return common;
}

double tail_for(size_t rows) {
  return kFalseAlarms / double(rows);
}

}  // namespace

const char* verdict_name(Verdict verdict) {
  switch (verdict) {
    case Verdict::same:
      return "ok";
    case Verdict::faster:
      return "faster";
    case Verdict::slow:
      return "SLOW";
    case Verdict::inconclusive:
      return "UNKNOWN";
  }
  return "";
}

ExitCode Comparison::exit_code() const {
  const auto any = [&](Verdict verdict) {
    return std::any_of(rows.begin(), rows.end(), [&](const RowComparison& row) { return row.verdict == verdict; });
  };
  if (any(Verdict::slow)) return ExitCode::regression;
  return any(Verdict::inconclusive) ? ExitCode::inconclusive : ExitCode::ok;
}

Comparison compare(const BenchReport& base, const BenchReport& now, const CompareOptions& options) {
  Comparison result{.kind = options.ratio_only ? "ratio" : "files", .max_regress = options.max_regress};
  if (!options.ratio_only) refuse_other_device(base.machine, now.machine);
  note_changes(base, now, result.notes);
  const auto before = quantities(base, options.ratio_only), after = quantities(now, options.ratio_only);
  const auto names = common_names(base, before, after, options, result.notes);
  const double tail = tail_for(names.size());
  // The two sides of a ratio were taken in the same rounds, so the machine's drift is in neither.
  const Drift drift = options.ratio_only ? Drift{} : control_drift(base, now, tail);
  result.drift = std::expm1(drift.log_ratio);
  for (const std::string& name : names) {
    const Difference d = difference(before.at(name), after.at(name), drift, tail);
    result.rows.push_back(judge(name, d, options.max_regress));
  }
  return result;
}

Comparison compare_pairs(const std::vector<std::pair<BenchReport, BenchReport>>& pairs, const CompareOptions& options) {
  if (pairs.empty()) fail(ExitCode::internal, "compare_pairs: no pair of runs");
  Comparison result{.kind = "against", .max_regress = options.max_regress};
  const auto& [first_base, first_now] = pairs.front();
  note_changes(first_base, first_now, result.notes);
  const auto names = common_names(first_base, quantities(first_base, options.ratio_only),
                                  quantities(first_now, options.ratio_only), options, result.notes);
  for (const std::string& name : names) {
    std::vector<double> base, now, ratios;
    for (const auto& [other, ours] : pairs) {
      base.push_back(median(quantities(other, options.ratio_only).at(name)));
      now.push_back(median(quantities(ours, options.ratio_only).at(name)));
      ratios.push_back(now.back() / base.back());
    }
    const LogEstimate ratio = estimate_log(ratios, tail_for(names.size()));
    result.rows.push_back(
        judge(name, {.base = median(base), .now = median(now), .log_ratio = ratio.log_median, .noise = ratio.noise},
              options.max_regress));
  }
  return result;
}

nlohmann::json to_json(const Comparison& comparison) {
  const auto number = [](double value) {
    return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json(nullptr);
  };
  nlohmann::json rows = nlohmann::json::array();
  for (const RowComparison& row : comparison.rows)
    rows.push_back({{"name", row.name},
                    {"base", number(row.base)},
                    {"now", number(row.now)},
                    {"change", number(row.change)},
                    {"noise", number(row.noise)},
                    {"verdict", verdict_name(row.verdict)}});
  return {{"kind", comparison.kind},           {"max_regress", comparison.max_regress},
          {"drift", number(comparison.drift)}, {"exit_code", int(comparison.exit_code())},
          {"rows", std::move(rows)},           {"notes", comparison.notes}};
}

double parse_max_regress(const std::string& text) {
  const bool percent = !text.empty() && text.back() == '%';
  const std::string digits = percent ? text.substr(0, text.size() - 1) : text;
  double value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc{} || end != digits.data() + digits.size() || !std::isfinite(value))
    fail(ExitCode::usage, "--max-regress: got '", text, "', expected a percentage such as 3%");
  if (!percent && value >= 1)
    fail(ExitCode::usage, "--max-regress: got '", text, "', which may mean ", text, "% or ", text,
         " times; write the percent sign");
  if (percent) value /= 100;
  if (!(value >= 0.001 && value <= 10))
    fail(ExitCode::usage, "--max-regress: got '", text, "', expected 0.1% to 1000%");
  return value;
}

}  // namespace pyra::tasks
