#include "io/charts.h"

#include <cmath>
#include <limits>

#include "base/philox.h"
#include "catch.h"
#include "pages.h"

using namespace pyra;
using test::count_of;

namespace {

template <class Chart>
std::string drawn(const Chart& chart) {
  io::Markup out;
  draw(out, chart);
  std::string text = std::move(out).take();
  CHECK(test::page_fault(text).empty());
  CHECK(text.find("nan") == std::string::npos);
  CHECK(text.find("inf") == std::string::npos);
  CHECK(count_of(text, "<svg ") == 1);
  CHECK(text.find("role=\"img\" aria-labelledby=\"n1 n2\"") != std::string::npos);
  CHECK(text.find("<title id=\"n1\">") != std::string::npos);
  CHECK(text.find("<desc id=\"n2\">") != std::string::npos);
  return text;
}

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

TEST_CASE("an axis covers its values with a few round numbers", "[charts]") {
  CHECK(io::axis_ticks(0, 1) == std::vector<double>{0, 0.2, 0.4, 0.6000000000000001, 0.8, 1});
  CHECK(io::axis_ticks(0, 460) == std::vector<double>{0, 100, 200, 300, 400, 500});
  const Philox random(1, RandomStream::bench);
  for (uint64_t i = 0; i < 3000; ++i) {
    const double scale = std::pow(10.0, double(random.below(4 * i, 198)) - 99);
    double low = scale * double(random.normal(4 * i + 1)), high = scale * double(random.normal(4 * i + 2));
    if (random.below(4 * i + 3, 10) == 0) high = low;
    if (low > high) std::swap(low, high);
    const std::vector<double> ticks = io::axis_ticks(low, high);
    CAPTURE(low, high, ticks.size());
    REQUIRE(ticks.size() >= 3);
    REQUIRE(ticks.size() <= 12);
    REQUIRE(std::is_sorted(ticks.begin(), ticks.end()));
    const double hair = (ticks.back() - ticks.front()) * 1e-6;
    REQUIRE(ticks.front() <= low + hair);
    REQUIRE(ticks.back() >= high - hair);
  }
  CHECK(io::axis_ticks(0, 0).size() >= 3);
  CHECK(io::axis_ticks(5, 5 + 1e-12).size() >= 3);
  CHECK(io::axis_ticks(0, 1e-310).size() >= 3);
}

TEST_CASE("curves go from the first point to the last, whatever stands between", "[charts]") {
  io::LineChart chart{
      .title = "Loss <of> \"it\"", .description = "a & b", .x_label = "epochs", .y_label = "", .series = {}};
  chart.series.push_back(
      {.name = "<script>alert(1)</script>", .points = {{1, 2.5}, {2, kNan}, {3, kInfinity}, {4, 0.5}}});
  chart.series.push_back({.name = "one", .points = {{2, 1.0}}, .marks = true});
  chart.series.push_back({.name = "none", .points = {{kNan, 1.0}, {1e200, 3}}});
  const std::string text = drawn(chart);
  CHECK(count_of(text, "class=\"curve s0\"") == 2);  // the curve and its legend
  CHECK(count_of(text, "<circle") == 1);
  CHECK(text.find("<title id=\"n1\">Loss &lt;of&gt; &quot;it&quot;</title>") != std::string::npos);
  CHECK(text.find("none</text>") == std::string::npos);

  // Longer than what can be seen: thinned, and the last point is there.
  io::Series lengthy{.name = "long", .points = {}};
  for (int i = 0; i <= 100000; ++i) lengthy.points.emplace_back(i, i % 7);
  const std::string thinned =
      drawn(io::LineChart{.title = "t", .description = "d", .x_label = "x", .y_label = "y", .series = {lengthy}});
  CHECK(thinned.size() < 60000);
  CHECK(thinned.find("L536 ") != std::string::npos);
  drawn(io::LineChart{.title = "empty", .description = "d", .x_label = "x", .y_label = "y", .series = {}});
}

TEST_CASE("points stand where they belong, with their names and their front", "[charts]") {
  io::ScatterChart chart{.title = "t", .description = "d", .x_label = "x", .y_label = "y", .points = {}};
  chart.points.push_back({.name = "slow & good", .x = 100, .y = 80, .x_deviation = 5, .y_deviation = 1, .front = true});
  chart.points.push_back({.name = "fast", .x = 400, .y = 70, .front = true});
  chart.points.push_back({.name = "bad", .x = 90, .y = 60});
  chart.points.push_back({.name = "broken", .x = kNan, .y = 60});
  const std::string text = drawn(chart);
  CHECK(count_of(text, "<circle") == 3);
  CHECK(count_of(text, "class=\"s0 f0\"") == 2);
  CHECK(count_of(text, "class=\"front\"") == 1);
  CHECK(text.find(">slow &amp; good</text>") != std::string::npos);
  CHECK(text.find(">bad</text>") != std::string::npos);

  // Fifty points in one place: all are drawn, and only names that find room.
  chart.points.assign(50, {.name = "same place", .x = 1, .y = 1, .front = true});
  const std::string crowd = drawn(chart);
  CHECK(count_of(crowd, "<circle") == 50);
  CHECK(count_of(crowd, ">same place</text>") < 5);
  CHECK(count_of(crowd, ">same place</text>") >= 1);
}

TEST_CASE("a matrix shades each count by its share of the row", "[charts]") {
  io::MatrixChart chart{.title = "t",
                        .description = "d",
                        .row_label = "class",
                        .column_label = "predicted",
                        .names = {"a", "b<"},
                        .counts = {{{0, 0}, 3}, {{0, 1}, 1}, {{1, 0}, 2}}};
  const std::string text = drawn(chart);
  CHECK(text.find("<title>a, taken for b&lt;: 1 (25.00 % of the row)</title>") != std::string::npos);
  CHECK(text.find("<title>b&lt;, taken for a: 2 (100.00 % of the row)</title>") != std::string::npos);
  CHECK(count_of(text, "<rect") == 4);  // three counts and the frame
  drawn(io::MatrixChart{
      .title = "t", .description = "d", .row_label = "r", .column_label = "c", .names = {}, .counts = {}});
}
