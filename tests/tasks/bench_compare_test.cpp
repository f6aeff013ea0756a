#include "tasks/bench_compare.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/philox.h"
#include "support.h"
#include "tasks/bench_stats.h"

using namespace pyra;
using namespace pyra::tasks;

namespace {

const std::string kDense = "infer/vit_ti_patch8_112/dense/cpu/fp32/b32";
const std::string kMerged = "infer/vit_ti_patch8_112/pyra-high/cpu/fp32/b32";

// What a run of `n` rounds would have measured: true time, relative noise, and a machine that is `machine` times
// slower than usual, control work included. Every draw has its own seed.
struct Scene {
  double dense_ms = 100, merged_ms = 32;
  double noise = 0.005;
  double machine = 1;
  size_t n = 11;
};

BenchReport measure(const Scene& scene, uint64_t seed) {
  const Philox random(seed, RandomStream::bench);
  uint64_t at = 0;
  const auto draw = [&](double ms) {
    std::vector<double> values;
    for (size_t i = 0; i < scene.n; ++i)
      values.push_back(ms * scene.machine * std::exp(scene.noise * double(random.normal(at++))));
    return values;
  };
  BenchReport report;
  report.settings.arch = "vit_ti_patch8_112";
  report.machine = {.date = "2025-01-01T00:00:00+00:00", .cpu_model = "A CPU", .dtype = "fp32", .threads = 2};
  report.peak_memory = "process RSS peak";
  report.control_ms = draw(5);
  for (const auto& [name, ms] : {std::pair{kDense, scene.dense_ms}, {kMerged, scene.merged_ms}}) {
    BenchRow row{.name = name, .batch = 32, .iterations = 4};
    row.real_ms = draw(ms);
    row.cpu_ms = row.real_ms;
    report.rows.push_back(row);
  }
  return report;
}

ExitCode verdict(const Scene& base, const Scene& now, const CompareOptions& options = {}) {
  return compare(measure(base, 1), measure(now, 2), options).exit_code();
}

std::string refusal(const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::usage);
    return error.what();
  }
  return "";
}

Verdict verdict_of(const Comparison& comparison, const std::string& name) {
  for (const RowComparison& row : comparison.rows)
    if (row.name == name) return row.verdict;
  FAIL("no row " << name);
  return Verdict::same;
}

}  // namespace

TEST_CASE("the median is the middle, the spread ignores an outlier", "[bench]") {
  CHECK(median(std::vector<double>{3, 1, 2}) == 2);
  CHECK(median(std::vector<double>{4, 1, 2, 3}) == 2.5);
  CHECK(relative_spread(std::vector<double>{98, 99, 100, 101, 102}) == Approx(0.014826));
  CHECK(relative_spread(std::vector<double>{98, 99, 100, 101, 900}) == Approx(0.014826));
  CHECK(relative_spread(std::vector<double>{7}) == 0);
}

TEST_CASE("the noise of an estimate covers the truth as often as it says", "[bench]") {
  // log-normal values around 1: the log of the median is 0, and exceeds its noise with a probability below `tail`.
  const double tail = 0.02;
  int above = 0;
  const int draws = 4000;
  for (int seed = 0; seed < draws; ++seed) {
    const Philox random(uint64_t(seed), RandomStream::bench, 7);
    std::vector<double> values;
    for (uint64_t i = 0; i < 11; ++i) values.push_back(std::exp(0.05 * double(random.normal(i))));
    const LogEstimate estimate = estimate_log(values, tail);
    above += estimate.log_median > estimate.noise;
  }
  CHECK(above < tail * draws);
  CHECK(above > 0);  // a noise no draw ever exceeds would be worth nothing
}

TEST_CASE("values that wander are noisier than the same values shuffled", "[bench]") {
  const std::vector<double> drifting{100, 101, 102, 103, 104, 105, 106, 107, 108, 109};
  const std::vector<double> shuffled{105, 101, 108, 100, 106, 103, 109, 102, 107, 104};
  CHECK(estimate_log(drifting, 0.01).noise > 2 * estimate_log(shuffled, 0.01).noise);
}

TEST_CASE("two values say nothing about their noise", "[bench]") {
  CHECK(std::isinf(estimate_log(std::vector<double>{1, 1}, 0.01).noise));
}

TEST_CASE("a comparison tells slow from same from unknown", "[bench]") {
  const Scene usual;
  CHECK(verdict(usual, usual) == ExitCode::ok);

  Scene slower = usual;
  slower.merged_ms *= 1.10;
  CHECK(verdict(usual, slower) == ExitCode::regression);
  const Comparison comparison = compare(measure(usual, 1), measure(slower, 2), {});
  CHECK(verdict_of(comparison, kMerged) == Verdict::slow);
  CHECK(verdict_of(comparison, kDense) == Verdict::same);

  Scene noisy = usual;
  noisy.noise = 0.12;
  CHECK(verdict(noisy, noisy) == ExitCode::inconclusive);

  Scene noisy_but_twice = noisy;
  noisy_but_twice.merged_ms *= 2;
  CHECK(verdict(noisy, noisy_but_twice) == ExitCode::regression);
}

TEST_CASE("faster is a pass, and noise does not turn it into doubt", "[bench]") {
  Scene usual, faster;
  faster.merged_ms *= 0.8;
  faster.dense_ms *= 0.8;
  const Comparison comparison = compare(measure(usual, 1), measure(faster, 2), {});
  CHECK(verdict_of(comparison, kMerged) == Verdict::faster);
  CHECK(comparison.exit_code() == ExitCode::ok);
  usual.noise = faster.noise = 0.04;  // noise above the threshold, but a regression is out of reach
  CHECK(verdict(usual, faster) == ExitCode::ok);
}

TEST_CASE("a change within the threshold passes, whatever its significance", "[bench]") {
  Scene usual, slightly;
  usual.noise = slightly.noise = 1e-4;
  slightly.merged_ms *= 1.02;
  CHECK(verdict(usual, slightly) == ExitCode::ok);
  CHECK(verdict(usual, slightly, {.max_regress = 0.01}) == ExitCode::regression);
}

TEST_CASE("a machine that slowed down is doubt, not a regression", "[bench]") {
  const Scene usual;
  Scene throttled = usual;
  throttled.machine = 1.3;
  CHECK(verdict(usual, throttled) == ExitCode::inconclusive);
  CHECK(verdict(usual, throttled, {.ratio_only = true}) == ExitCode::ok);
  Scene slower_too = throttled;
  slower_too.merged_ms *= 2;
  CHECK(verdict(usual, slower_too) == ExitCode::regression);
}

TEST_CASE("another device is refused, except for ratios", "[bench]") {
  const BenchReport base = measure({}, 1);
  const auto refused = [&](auto&& change, const std::string& what) {
    BenchReport now = measure({}, 2);
    change(now.machine);
    CHECK_THAT(refusal([&] { (void)compare(base, now, {}); }), Catch::Contains(what));
    CHECK(compare(base, now, {.ratio_only = true}).exit_code() == ExitCode::ok);
  };
  refused([](BenchMachine& m) { m.cpu_model = "Another CPU"; }, "cpu_model was 'A CPU', is 'Another CPU'");
  refused([](BenchMachine& m) { m.threads = 4; }, "threads");
  refused([](BenchMachine& m) { m.dtype = "bf16"; }, "dtype");
  refused([](BenchMachine& m) { m.device = "cuda:0"; }, "device");
}

TEST_CASE("a missing row is refused unless allowed, a new one is noted", "[bench]") {
  const BenchReport base = measure({}, 1);
  BenchReport now = measure({}, 2);
  now.rows[1].name = "infer/vit_ti_patch8_112/tome-high/cpu/fp32/b32";
  const std::string text = refusal([&] { (void)compare(base, now, {}); });
  CHECK_THAT(text, Catch::Contains(kMerged) && Catch::Contains("--allow-missing"));
  const Comparison comparison = compare(base, now, {.allow_missing = true});
  CHECK(comparison.rows.size() == 1);
  CHECK_THAT(join(comparison.notes), Catch::Contains("missing: " + kMerged) && Catch::Contains("new row"));
  now.rows.erase(now.rows.begin());
  CHECK_THAT(refusal([&] { (void)compare(base, now, {.allow_missing = true}); }),
             Catch::Contains("nothing to compare"));
}

TEST_CASE("ratio-only gates on merged over dense", "[bench]") {
  const Scene usual;
  Scene slower = usual;
  slower.merged_ms *= 1.10;
  CHECK(verdict(usual, slower, {.ratio_only = true}) == ExitCode::regression);
  // Both slower by as much: another machine, not another program.
  slower.dense_ms *= 1.10;
  CHECK(verdict(usual, slower, {.ratio_only = true}) == ExitCode::ok);
  BenchReport dense_only = measure(usual, 1);
  dense_only.rows.pop_back();
  CHECK_THAT(refusal([&] { (void)compare(dense_only, dense_only, {.ratio_only = true}); }),
             Catch::Contains("dense row"));
}

TEST_CASE("pairs of runs judge by their ratios", "[bench]") {
  // The machine is up to three times slower from pair to pair; within a pair it is the same.
  const auto pairs = [](double factor) {
    std::vector<std::pair<BenchReport, BenchReport>> result;
    for (uint64_t i = 0; i < 9; ++i) {
      Scene scene{.machine = 1 + 0.25 * double(i % 5), .n = 3};
      const BenchReport other = measure(scene, 100 + i);
      scene.merged_ms *= factor;
      result.emplace_back(other, measure(scene, 200 + i));
    }
    return result;
  };
  CHECK(compare_pairs(pairs(1), {}).exit_code() == ExitCode::ok);
  CHECK(compare_pairs(pairs(1.08), {}).exit_code() == ExitCode::regression);
  CHECK(compare_pairs(pairs(1.08), {.ratio_only = true}).exit_code() == ExitCode::regression);
  const auto two = pairs(1);
  CHECK(compare_pairs({two[0], two[1]}, {}).exit_code() == ExitCode::inconclusive);
}

TEST_CASE("equal programs are called slow in at most one comparison of twenty", "[bench]") {
  const double noise = GENERATE(0.002, 0.01, 0.03, 0.1);
  const size_t n = GENERATE(size_t{5}, size_t{9}, size_t{15});
  CAPTURE(noise, n);
  int slow = 0;
  const int comparisons = 1000;
  for (uint64_t i = 0; i < uint64_t(comparisons); ++i) {
    Scene scene{.noise = noise, .n = n};
    const BenchReport base = measure(scene, 2 * i);
    scene.machine = 1 + 0.02 * double(i % 4);  // the machine wanders between runs
    slow += compare(base, measure(scene, 2 * i + 1), {}).exit_code() == ExitCode::regression;
  }
  CHECK(slow <= comparisons / 20);
}

TEST_CASE("equal programs on a steady machine are called equal", "[bench]") {
  // Doubting everything would be no gate. 9 rounds are the fewest that bench takes by itself. Of thousands of draws
  // 94 % of the first row and all of the others are called equal.
  const auto [noise, n, share] =
      GENERATE(table<double, size_t, double>({{0.002, 5, 0.9}, {0.002, 9, 0.99}, {0.004, 15, 0.99}}));
  CAPTURE(noise, n);
  int equal = 0;
  const int comparisons = 1000;
  for (uint64_t i = 0; i < uint64_t(comparisons); ++i) {
    const Scene scene{.noise = noise, .n = n};
    equal += compare(measure(scene, 2 * i), measure(scene, 2 * i + 1), {}).exit_code() == ExitCode::ok;
  }
  CHECK(equal >= share * comparisons);
}

TEST_CASE("work done twice is called slow every time, on a quiet machine and on a noisy one", "[bench]") {
  const double noise = GENERATE(0.005, 0.05);
  for (uint64_t i = 0; i < 200; ++i) {
    Scene scene{.noise = noise};
    const BenchReport base = measure(scene, 2 * i);
    scene.merged_ms *= 2;
    REQUIRE(compare(base, measure(scene, 2 * i + 1), {}).exit_code() == ExitCode::regression);
  }
}

TEST_CASE("the threshold of --max-regress is a percentage", "[bench]") {
  CHECK(parse_max_regress("3%") == Approx(0.03));
  CHECK(parse_max_regress("0.05") == Approx(0.05));
  CHECK(parse_max_regress("12.5%") == Approx(0.125));
  for (const char* text : {"3", "", "%", "-1%", "nan", "nan%", "abc", "3 %", "0%", "0", "1e9%"}) {
    CAPTURE(text);
    CHECK_THAT(refusal([&] { (void)parse_max_regress(text); }), Catch::Contains("--max-regress"));
  }
}
