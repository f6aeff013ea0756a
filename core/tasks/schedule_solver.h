// Which tokens to remove where: the removal counts of the best quality among those that cost at most so much.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace pyra::tasks {

/// Removal counts, one a block.
using RemovalCounts = std::vector<int64_t>;

struct ScheduleProblem {
  int64_t depth = 0;
  int64_t limit = 0;  ///< the most that a block may remove
  std::function<double(const RemovalCounts&)> cost;
  double target = 0;                                    ///< the largest cost allowed
  std::function<double(const RemovalCounts&)> quality;  ///< more is better; asked `tries` times at most
  int64_t tries = 48;
  uint64_t seed = 0;
  /// Shapes to begin with beside the built-in ones, as relative counts.
  std::vector<std::vector<double>> shapes{};
};

struct ScheduleAnswer {
  RemovalCounts remove;
  double quality = 0;
  RemovalCounts uniform;  ///< as many tokens in every block, at the same cost
  double uniform_quality = 0;
  int64_t tries = 0;
};

/// The shape scaled up until the cost is just not above `target`: in no block could one token more stay. Empty when
/// even the limit, in every block that the shape names, costs more. `shape` holds relative counts, not all zero.
[[nodiscard]] RemovalCounts scale_to_cost(const std::vector<double>& shape, const ScheduleProblem& problem);

/// Begins with falling, even and rising shapes and the ones given, then moves tokens between blocks of the best one, by
/// seed, and keeps what is better; every candidate is scaled to the cost before it is judged. Deterministic for a
/// deterministic quality. Empty counts when no schedule is cheap enough. `noted` hears of every try.
[[nodiscard]] ScheduleAnswer solve_schedule(
    const ScheduleProblem& problem,
    const std::function<void(int64_t tries, double best, double uniform)>& noted = [](int64_t, double, double) {});

}  // namespace pyra::tasks
