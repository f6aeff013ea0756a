// Is the new measurement slower than the old one, the same, or can nobody tell?
#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "tasks/bench_report.h"

namespace pyra::tasks {

enum class Verdict { same, faster, slow, inconclusive };
[[nodiscard]] const char* verdict_name(Verdict verdict);  ///< "ok", "faster", "SLOW", "UNKNOWN"

struct CompareOptions {
  double max_regress = 0.03;   ///< how much longer a row may take: 0.03 is 3 %
  bool ratio_only = false;     ///< compare merged over dense of each file: for machines that change
  bool allow_missing = false;  ///< a row of the base may be missing
};

struct RowComparison {
  std::string name;
  double base = 0, now = 0;  ///< median ms per iteration; with ratio_only merged over dense
  double change = 0;         ///< now / base - 1: +0.10 takes 10 % longer
  double noise = 0;          ///< the same scale: a change below it may be chance
  Verdict verdict = Verdict::same;
};

/// The rule, for d = log(now / base) of the medians, threshold t = log(1 + max_regress) and noise w:
///   SLOW          d > t and d > w
///   UNKNOWN       otherwise, when w > t and d + w > t: a regression above the threshold could hide in the noise
///   faster        d < -t and d < -w; a pass
///   ok            everything else
/// w = sqrt(w_base^2 + w_now^2 + w_drift^2) + |drift|: half-widths of the estimates (bench_stats.h) at a confidence of
/// 99.5 % shared by all rows, so that one row in many does not fail by chance. drift is how much the control work,
/// which has nothing to do with the model, changed between the two files, and w_drift how well that is known.
struct Comparison {
  std::string kind;  ///< "files", "ratio" or "against"
  double max_regress = 0;
  double drift = 0;  ///< now / base - 1 of the control work
  std::vector<RowComparison> rows{};
  std::vector<std::string> notes{};  ///< for people: rows that are new or missing, what changed between the two

  /// regression if any row is SLOW, else inconclusive if any is UNKNOWN, else ok.
  [[nodiscard]] ExitCode exit_code() const;
};

/// Error(usage) when they cannot be compared: another device, CPU, thread count or dtype (not with ratio_only), rows
/// of the base missing (unless allowed), nothing in common.
[[nodiscard]] Comparison compare(const BenchReport& base, const BenchReport& now, const CompareOptions& options);

/// Runs of two programs taken in turn on one machine, {other, this one}: each pair gives one ratio of medians per
/// row, so what the machine does between pairs is in their spread. w is the half-width of the ratios' median.
[[nodiscard]] Comparison compare_pairs(const std::vector<std::pair<BenchReport, BenchReport>>& pairs,
                                       const CompareOptions& options);

[[nodiscard]] nlohmann::json to_json(const Comparison& comparison);

/// "3%" or "0.03" -> 0.03. Error(usage) for anything else, for a bare number of 1 or more ("3" may mean either), and
/// outside 0.1 % to 1000 %.
[[nodiscard]] double parse_max_regress(const std::string& text);

}  // namespace pyra::tasks
