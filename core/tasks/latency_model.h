// How long a forward pass takes by how many tokens its blocks see, fitted to a few measured schedules: so that a
// search can ask for the time of thousands of schedules.
#pragma once
#include <array>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace pyra::tasks {

/// Tokens of a pass: `entering` block 0, and leaving each block.
struct TokenPath {
  int64_t entering = 0;
  std::vector<int64_t> leaving;
};

struct LatencySample {
  TokenPath path;
  double time = 0;  ///< any unit; the model answers in the same
};

/// time = w0 + w1 Σ n + w2 Σ n² + w3 Σ n' + w4 · (blocks that merge), n entering a block and n' leaving its merge:
/// linear layers before the merge, attention, the MLP after it, and what a merge itself costs. No weight is negative.
class LatencyModel {
 public:
  /// Least squares of the relative errors. Error(usage) for fewer than two samples.
  [[nodiscard]] static LatencyModel fit(std::span<const LatencySample> samples);
  [[nodiscard]] double time(const TokenPath& path) const;
  /// Largest relative error over samples.
  [[nodiscard]] double worst_error(std::span<const LatencySample> samples) const;

 private:
  std::array<double, 5> weights_{};
};

/// The inference rows of a benchmark's JSON (`pyractl bench --json`, any machine) that are of architecture `arch` and
/// batch `batch`, dense and merged; `leaving` turns a merger's name and a written schedule into the tokens leaving each
/// block. Error(input) naming the file when there is no dense row or fewer than four merged ones.
[[nodiscard]] std::vector<LatencySample> read_latency_table(
    const std::filesystem::path& path, const std::string& arch, int64_t batch, const TokenPath& dense,
    const std::function<std::vector<int64_t>(const std::string& merger, const std::string& schedule)>& leaving);

}  // namespace pyra::tasks
