// Charts as inline SVG: colours from the page's style sheet, so that they read in dark and light.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "io/markup.h"

namespace pyra::io {

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;  ///< x ascending; what is not finite is left out
  bool marks = false;                             ///< single marks beside a thin line, for what was measured seldom
};

struct LineChart {
  std::string title, description, x_label, y_label;
  std::vector<Series> series;  ///< those without a point are left out; colours repeat with dashes after eight
};

struct ScatterPoint {
  std::string name;
  double x = 0, y = 0;
  double x_deviation = 0, y_deviation = 0;  ///< bars to both sides; 0: none
  bool front = false;                       ///< filled, and joined with the others of the front
};

/// Further right and further up are better. Names that find no room are left to the tooltip.
struct ScatterChart {
  std::string title, description, x_label, y_label;
  std::vector<ScatterPoint> points;
};

/// Counts by (row, column), as shares of their row.
struct MatrixChart {
  std::string title, description, row_label, column_label;
  std::vector<std::string> names;  ///< of rows and columns
  std::map<std::pair<int64_t, int64_t>, int64_t> counts;
};

void draw(Markup& out, const LineChart& chart);
void draw(Markup& out, const ScatterChart& chart);
void draw(Markup& out, const MatrixChart& chart);

/// Round values that cover low to high: 3 to 12 of them, ascending. Both are finite, and below 1e100.
[[nodiscard]] std::vector<double> axis_ticks(double low, double high);

}  // namespace pyra::io
