#include "tasks/schedule_solver.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "base/philox.h"

namespace pyra::tasks {
namespace {

using Shape = std::vector<double>;

/// Counts whose running sums are the shape's, rounded: no block's rounding adds to another's.
RemovalCounts rounded(const Shape& shape, double scale, int64_t limit) {
  RemovalCounts counts;
  double sum = 0;
  int64_t given = 0;
  for (const double part : shape) {
    sum += part * scale;
    const int64_t count = std::clamp<int64_t>(std::llround(sum) - given, 0, limit);
    counts.push_back(count);
    given += count;
    // What a full block could not take is not pushed into the next ones.
    if (count == limit) sum = double(given);
  }
  return counts;
}

Shape exponential(int64_t depth, double rate) {
  Shape shape;
  for (int64_t i = 0; i < depth; ++i)
    shape.push_back(std::exp(-rate * double(i) / double(std::max<int64_t>(depth - 1, 1))));
  return shape;
}

Shape shape_of(const RemovalCounts& counts) {
  return {counts.begin(), counts.end()};
}

class Search {
 public:
  Search(const ScheduleProblem& problem, const std::function<void(int64_t, double, double)>& noted)
      : problem_(problem), noted_(noted), random_(problem.seed, RandomStream::search) {}

  ScheduleAnswer run() {
    answer_.uniform = scale_to_cost(exponential(problem_.depth, 0), problem_);
    if (answer_.uniform.empty()) return answer_;
    answer_.remove = answer_.uniform;
    answer_.quality = answer_.uniform_quality = judge(answer_.uniform);
    for (const Shape& shape : problem_.shapes) consider(shape);
    for (const double rate : {1.0, 2.0, 4.0, -1.0, 0.5, 3.0, 6.0}) consider(exponential(problem_.depth, rate));
    // First moves are bold; later ones refine.
    for (uint64_t step = 0; answer_.tries < problem_.tries && step < 8 * uint64_t(problem_.tries); ++step)
      consider(moved(step));
    answer_.tries = int64_t(known_.size());
    return answer_;
  }

 private:
  double judge(const RemovalCounts& counts) {
    const auto found = known_.find(counts);
    if (found != known_.end()) return found->second;
    const double quality = problem_.quality(counts);
    known_.emplace(counts, quality);
    answer_.tries = int64_t(known_.size());
    return quality;
  }

  void consider(const Shape& shape) {
    if (answer_.tries >= problem_.tries) return;
    const RemovalCounts counts = scale_to_cost(shape, problem_);
    if (counts.empty() || known_.contains(counts)) return;
    const double quality = judge(counts);
    if (quality > answer_.quality) answer_.quality = quality, answer_.remove = counts;
    noted_(answer_.tries, answer_.quality, answer_.uniform_quality);
  }

  /// The best so far with a share of one block's tokens taken by another.
  Shape moved(uint64_t step) {
    Shape shape = shape_of(answer_.remove);
    const auto draw = [&](uint64_t word) { return double(random_.uniform(4 * step + word)); };
    const auto from = size_t(draw(0) * double(shape.size())), to = size_t(draw(1) * double(shape.size()));
    const double progress = double(answer_.tries) / double(problem_.tries);
    const double share = (0.15 + 0.85 * draw(2)) * (1 - 0.6 * progress);
    const double amount = std::max(1.0, shape[from] * share);
    shape[from] = std::max(0.0, shape[from] - amount);
    shape[to] += amount;
    return shape;
  }

  const ScheduleProblem& problem_;
  const std::function<void(int64_t, double, double)>& noted_;
  Philox random_;
  std::map<RemovalCounts, double> known_;
  ScheduleAnswer answer_;
};

}  // namespace

namespace {

/// Tokens that need not go, from the last block to the first: scaling moves several counts at once.
RemovalCounts give_back(RemovalCounts counts, const ScheduleProblem& problem) {
  for (size_t i = counts.size(); i-- > 0;)
    while (counts[i] > 0) {
      --counts[i];
      if (problem.cost(counts) <= problem.target) continue;
      ++counts[i];
      break;
    }
  return counts;
}

}  // namespace

RemovalCounts scale_to_cost(const Shape& shape, const ScheduleProblem& problem) {
  const double total = [&] {
    double sum = 0;
    for (const double part : shape) sum += part;
    return sum;
  }();
  if (!(total > 0)) return {};
  // At `enough` every block that the shape names is at its limit.
  double least = total;
  for (const double part : shape)
    if (part > 0) least = std::min(least, part);
  double too_little = 0, enough = double(problem.limit) / least;
  const auto at = [&](double scale) { return rounded(shape, scale, problem.limit); };
  if (problem.cost(at(enough)) > problem.target) return {};
  for (int i = 0; i < 60; ++i) {
    const double middle = (too_little + enough) / 2;
    (problem.cost(at(middle)) > problem.target ? too_little : enough) = middle;
  }
  return give_back(at(enough), problem);
}

ScheduleAnswer solve_schedule(const ScheduleProblem& problem,
                              const std::function<void(int64_t, double, double)>& noted) {
  return Search(problem, noted).run();
}

}  // namespace pyra::tasks
