#include "tasks/latency_model.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "tasks/bench_report.h"
#include "tasks/bench_stats.h"

namespace pyra::tasks {
namespace {

constexpr size_t kTerms = 5;
constexpr int64_t kLeastMerged = 4;
using Terms = std::array<double, kTerms>;

Terms terms_of(const TokenPath& path) {
  Terms terms{1, 0, 0, 0, 0};
  auto tokens = double(path.entering);
  for (const int64_t after : path.leaving) {
    terms[1] += tokens;
    terms[2] += tokens * tokens;
    terms[3] += double(after);
    terms[4] += double(after) != tokens;
    tokens = double(after);
  }
  return terms;
}

double dot(const Terms& a, const Terms& b) {
  double sum = 0;
  for (size_t i = 0; i < kTerms; ++i) sum += a[i] * b[i];
  return sum;
}

/// min |A w - 1|² over w >= 0 by coordinate descent on the normal equations: five unknowns, so thousands of sweeps cost
/// nothing. Columns are scaled to one, or the sweeps would crawl.
Terms non_negative_fit(const std::vector<Terms>& rows) {
  Terms scale{};
  for (const Terms& row : rows)
    for (size_t i = 0; i < kTerms; ++i) scale[i] += row[i] * row[i];
  std::array<Terms, kTerms> gram{};
  Terms right{}, w{};
  for (const Terms& row : rows)
    for (size_t i = 0; i < kTerms; ++i) {
      const double a = scale[i] > 0 ? row[i] / std::sqrt(scale[i]) : 0;
      right[i] += a;
      for (size_t j = 0; j < kTerms; ++j) gram[i][j] += scale[j] > 0 ? a * row[j] / std::sqrt(scale[j]) : 0;
    }
  constexpr int kSweeps = 20000;
  for (int sweep = 0; sweep < kSweeps; ++sweep)
    for (size_t i = 0; i < kTerms; ++i)
      if (gram[i][i] > 0) w[i] = std::max(0.0, w[i] + (right[i] - dot(gram[i], w)) / gram[i][i]);
  for (size_t i = 0; i < kTerms; ++i) w[i] = scale[i] > 0 ? w[i] / std::sqrt(scale[i]) : 0;
  return w;
}

/// "infer/ARCH/MERGE-SCHEDULE/DEVICE/DTYPE/bN": the merge part, or "" where the row is not of this architecture.
std::string merge_part(const std::string& name, const std::string& arch) {
  const std::vector<std::string> parts = split(name, '/');
  const bool ours = parts.size() == 6 && parts[0] == "infer" && parts[1] == arch;
  return ours ? parts[2] : "";
}

}  // namespace

LatencyModel LatencyModel::fit(std::span<const LatencySample> samples) {
  if (samples.size() < 2)
    fail(ExitCode::usage, "a latency model needs at least two measured schedules, got ", samples.size());
  std::vector<Terms> rows;
  for (const LatencySample& sample : samples) {
    Terms row = terms_of(sample.path);
    for (double& term : row) term /= sample.time;
    rows.push_back(row);
  }
  LatencyModel model;
  model.weights_ = non_negative_fit(rows);
  return model;
}

double LatencyModel::time(const TokenPath& path) const {
  return dot(weights_, terms_of(path));
}

double LatencyModel::worst_error(std::span<const LatencySample> samples) const {
  double worst = 0;
  for (const LatencySample& sample : samples) worst = std::max(worst, std::abs(time(sample.path) / sample.time - 1));
  return worst;
}

std::vector<LatencySample> read_latency_table(
    const std::filesystem::path& path, const std::string& arch, int64_t batch, const TokenPath& dense,
    const std::function<std::vector<int64_t>(const std::string&, const std::string&)>& leaving) {
  const BenchReport report = read_report(path);
  std::vector<LatencySample> samples;
  bool has_dense = false;
  for (const BenchRow& row : report.rows) {
    const std::string merge = merge_part(row.name, arch);
    if (merge.empty() || row.batch != batch) continue;
    LatencySample sample{.path = dense, .time = median(row.real_ms)};
    if (merge != "dense") {
      const size_t dash = merge.find('-');
      if (dash == std::string::npos) continue;
      sample.path.leaving = leaving(merge.substr(0, dash), merge.substr(dash + 1));
    }
    has_dense |= merge == "dense";
    samples.push_back(std::move(sample));
  }
  const int64_t merged = int64_t(samples.size()) - (has_dense ? 1 : 0);
  if (!has_dense || merged < kLeastMerged)
    fail(ExitCode::input, path.string(), ": holds ", has_dense ? "a" : "no", " dense row and ", merged,
         " merged ones for infer/", arch, " at batch ", batch, ", expected a dense one and at least ", kLeastMerged,
         " merged: `pyractl bench --merge NAME --schedule S --json` for several S, their rows in one file");
  return samples;
}

}  // namespace pyra::tasks
