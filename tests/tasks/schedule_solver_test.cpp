// Where tokens are best removed: on costs and qualities whose answers are known.
#include "tasks/schedule_solver.h"

#include <cmath>
#include <numeric>

#include "support.h"
#include "tasks/latency_model.h"

using namespace pyra;
using namespace pyra::tasks;

namespace {

int64_t sum(const RemovalCounts& counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

/// Every token removed saves 1 of 1000, wherever.
ScheduleProblem flat(double target) {
  return {.depth = 4,
          .limit = 10,
          .cost = [](const RemovalCounts& remove) { return 1000.0 - double(sum(remove)); },
          .target = target,
          .quality = {}};
}

/// A token removed in block i saves the work of all blocks after it; at most half of them go, as mergers cut it.
double work(const RemovalCounts& remove) {
  int64_t tokens = 197, total = 0;
  for (const int64_t r : remove) total += tokens -= std::min(r, tokens / 2);
  return double(total);
}

}  // namespace

TEST_CASE("a shape is scaled until no token more could stay", "[solver]") {
  CHECK(sum(scale_to_cost({1, 1, 1, 1}, flat(990))) == 10);
  CHECK(scale_to_cost({1, 1, 1, 1}, flat(992)) == RemovalCounts{2, 2, 2, 2});
  CHECK(scale_to_cost({1, 1, 1, 1}, flat(960)) == RemovalCounts{10, 10, 10, 10});
  CHECK(scale_to_cost({1, 1, 1, 1}, flat(959)).empty());
  CHECK(scale_to_cost({3, 1, 0, 0}, flat(996)) == RemovalCounts{3, 1, 0, 0});
  // A block at its limit leaves its share to the others.
  CHECK(scale_to_cost({100, 1, 0, 0}, flat(985)) == RemovalCounts{10, 5, 0, 0});
  CHECK(scale_to_cost({1, 0, 0, 0}, flat(989)).empty());
  CHECK(scale_to_cost({0, 0, 0, 0}, flat(990)).empty());
}

TEST_CASE("the solver finds where tokens are cheap to lose", "[solver]") {
  // What a token costs in quality falls from block to block; what it saves falls too.
  const auto harm = [](const RemovalCounts& remove) {
    double total = 0;
    for (size_t i = 0; i < remove.size(); ++i) total += double(remove[i] * remove[i]) / double(1 + i);
    return -total;
  };
  ScheduleProblem problem{.depth = 12, .limit = 98, .cost = work, .target = 0.6 * 12 * 197, .quality = harm};
  problem.tries = 400;
  const ScheduleAnswer answer = solve_schedule(problem);
  CHECK(answer.tries <= 400);
  CHECK(work(answer.remove) <= problem.target);
  CHECK(answer.quality == harm(answer.remove));
  CHECK(answer.uniform_quality == harm(answer.uniform));
  CHECK(answer.quality > answer.uniform_quality);
  // Against the optimum by Lagrange: r_i = λ (1 + i) (12 - i) / 2, scaled to the same work.
  std::vector<double> best;
  for (int i = 0; i < 12; ++i) best.push_back(double((1 + i) * (12 - i)));
  const RemovalCounts optimum = scale_to_cost(best, problem);
  CHECK(answer.quality > harm(answer.uniform) + 0.8 * (harm(optimum) - harm(answer.uniform)));
  CHECK(solve_schedule(problem).remove == answer.remove);
  problem.seed = 1;
  CHECK(solve_schedule(problem).quality > answer.uniform_quality);
}

TEST_CASE("the solver never judges more than it may, and says when nothing is cheap enough", "[solver]") {
  int64_t judged = 0;
  ScheduleProblem problem{.depth = 12, .limit = 98, .cost = work, .target = 1500, .quality = [&](const RemovalCounts&) {
                            ++judged;
                            return 0.5;
                          }};
  problem.tries = 7;
  CHECK(solve_schedule(problem).tries == 7);
  CHECK(judged == 7);
  problem.target = 1;
  CHECK(solve_schedule(problem).remove.empty());
  CHECK(judged == 7);
}

TEST_CASE("the latency model recovers the weights that made its samples", "[solver]") {
  const auto path = [](const RemovalCounts& remove) {
    TokenPath path{.entering = 197, .leaving = {}};
    int64_t tokens = 197;
    for (const int64_t r : remove) path.leaving.push_back(tokens -= r);
    return path;
  };
  const auto truth = [](const TokenPath& path) {
    double tokens = double(path.entering), time = 0.3;
    for (const int64_t after : path.leaving) {
      time += 2e-3 * tokens + 5e-6 * tokens * tokens + 3e-3 * double(after) + (double(after) != tokens ? 0.05 : 0.0);
      tokens = double(after);
    }
    return time;
  };
  std::vector<LatencySample> samples;
  for (const RemovalCounts& remove : std::vector<RemovalCounts>{{0, 0, 0, 0},
                                                                {40, 30, 20, 10},
                                                                {10, 10, 10, 10},
                                                                {0, 0, 60, 30},
                                                                {80, 0, 0, 0},
                                                                {5, 20, 40, 50},
                                                                {20, 0, 20, 0}}) {
    const TokenPath at = path(remove);
    samples.push_back({at, truth(at)});
  }
  const LatencyModel model = LatencyModel::fit(samples);
  CHECK(model.worst_error(samples) < 1e-3);
  for (const RemovalCounts& remove : std::vector<RemovalCounts>{{30, 30, 30, 30}, {1, 2, 3, 4}, {98, 40, 20, 10}})
    CHECK(model.time(path(remove)) == Approx(truth(path(remove))).epsilon(0.01));
  // Times that no such model explains: no weight turns negative, and fewer tokens never take longer.
  for (LatencySample& sample : samples) sample.time = 1 / sample.time;
  const LatencyModel wrong = LatencyModel::fit(samples);
  CHECK(wrong.time(path({40, 40, 40, 40})) <= wrong.time(path({1, 1, 1, 1})));
  CHECK_THROWS_WITH(LatencyModel::fit({}), Catch::Contains("at least two"));
}
