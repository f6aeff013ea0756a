#include "io/charts.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/text.h"

namespace pyra::io {
namespace {

constexpr double kLargest = 1e100;  // differences and products of what is drawn stay finite
constexpr size_t kMaxPoints = 1500;
constexpr size_t kColours = 8;
constexpr double kLetter = 7.4;  // about the width of a letter, where no one can measure it

bool drawable(double value) {
  return std::isfinite(value) && std::abs(value) < kLargest;
}

struct Range {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  void add(double value) {
    if (!drawable(value)) return;
    low = std::min(low, value);
    high = std::max(high, value);
  }
  [[nodiscard]] std::vector<double> ticks() const { return low <= high ? axis_ticks(low, high) : axis_ticks(0, 1); }
};

/// Where a plot lies in its drawing, and how values become places in it.
struct Frame {
  double left, top, right, bottom;
  std::vector<double> x_ticks, y_ticks;
  [[nodiscard]] double x(double value) const {
    return left + (right - left) * (value - x_ticks.front()) / (x_ticks.back() - x_ticks.front());
  }
  [[nodiscard]] double y(double value) const {
    return bottom - (bottom - top) * (value - y_ticks.front()) / (y_ticks.back() - y_ticks.front());
  }
};

void write_text(Markup& out, double x, double y, const char* anchor, const char* style, std::string_view words) {
  out.element("text", {{"x", x}, {"y", y}, {"text-anchor", anchor}, {"class", style}}, words);
}

void draw_line(Markup& out, double x1, double y1, double x2, double y2, const char* style) {
  out.empty("line", {{"x1", x1}, {"y1", y1}, {"x2", x2}, {"y2", y2}, {"class", style}});
}

void draw_frame(Markup& out, const Frame& frame, const std::string& title, const std::string& x_label,
                const std::string& y_label) {
  for (const double tick : frame.y_ticks) {
    draw_line(out, frame.left, frame.y(tick), frame.right, frame.y(tick), "grid");
    write_text(out, frame.left - 6, frame.y(tick) + 4, "end", "dim", significant(tick));
  }
  for (const double tick : frame.x_ticks) {
    draw_line(out, frame.x(tick), frame.bottom, frame.x(tick), frame.bottom + 4, "axis");
    write_text(out, frame.x(tick), frame.bottom + 18, "middle", "dim", significant(tick));
  }
  draw_line(out, frame.left, frame.bottom, frame.right, frame.bottom, "axis");
  write_text(out, frame.left, 16, "start", "", title);
  write_text(out, frame.right, frame.bottom + 36, "end", "dim", x_label);
  write_text(out, frame.left, 34, "start", "dim", y_label);
}

std::string class_of(const char* kind, size_t number) {
  return kind + std::to_string(number % kColours);
}

const char* dashes_of(size_t number) {
  constexpr const char* kDashes[] = {"none", "7 3", "2 3", "9 3 2 3"};
  return kDashes[number / kColours % std::size(kDashes)];
}

/// "M x y L x y …" of at most kMaxPoints of the points, the last one among them.
std::string path_of(const std::vector<std::pair<double, double>>& points, const Frame& frame) {
  std::string path;
  const size_t stride = (points.size() + kMaxPoints - 1) / kMaxPoints;
  for (size_t i = 0; i < points.size(); ++i) {
    if (i % stride != 0 && i + 1 != points.size()) continue;
    path += path.empty() ? "M" : "L";
    path.append(decimal(frame.x(points[i].first), 2)).append(" ").append(decimal(frame.y(points[i].second), 2));
  }
  return path;
}

void draw_marks(Markup& out, const Series& series, const Frame& frame, size_t number) {
  const size_t stride = (series.points.size() + kMaxPoints - 1) / kMaxPoints;
  for (size_t i = 0; i < series.points.size(); ++i) {
    if (i % stride != 0 && i + 1 != series.points.size()) continue;
    const auto [x, y] = series.points[i];
    out.open("circle", {{"cx", frame.x(x)}, {"cy", frame.y(y)}, {"r", 3.5}, {"class", class_of("f", number)}});
    out.element("title", series.name + ": " + significant(y) + " at " + significant(x));
    out.close();
  }
}

std::vector<Series> drawable_series(const LineChart& chart) {
  std::vector<Series> kept;
  for (Series series : chart.series) {
    std::erase_if(series.points, [](const auto& point) { return !drawable(point.first) || !drawable(point.second); });
    if (!series.points.empty()) kept.push_back(std::move(series));
  }
  return kept;
}

void draw_legend(Markup& out, const std::vector<Series>& all, double left, double top) {
  for (size_t i = 0; i < all.size(); ++i) {
    const double y = top + 18 * double(i);
    out.empty("line", {{"x1", left},
                       {"y1", y},
                       {"x2", left + 22},
                       {"y2", y},
                       {"class", "curve " + class_of("s", i)},
                       {"stroke-width", 2.0},
                       {"stroke-dasharray", dashes_of(i)}});
    write_text(out, left + 28, y + 4, "start", "", printable(all[i].name, 60));
  }
}

struct Box {
  double left, top, right, bottom;
  [[nodiscard]] bool meets(const Box& other) const {
    return left < other.right && other.left < right && top < other.bottom && other.top < bottom;
  }
};

/// Puts a name beside each point, where no other name and no point is, or nowhere.
void draw_names(Markup& out, const std::vector<const ScatterPoint*>& points, const Frame& frame, double width) {
  std::vector<Box> taken;
  for (const ScatterPoint* point : points) {
    const double x = frame.x(point->x), y = frame.y(point->y);
    taken.push_back({x - 5, y - 5, x + 5, y + 5});
    if (point->x_deviation > 0)
      taken.push_back({frame.x(point->x - point->x_deviation), y - 1, frame.x(point->x + point->x_deviation), y + 1});
    if (point->y_deviation > 0)
      taken.push_back({x - 1, frame.y(point->y + point->y_deviation), x + 1, frame.y(point->y - point->y_deviation)});
  }
  // Those of the front first: they are what the chart is about.
  std::vector<const ScatterPoint*> order = points;
  std::stable_partition(order.begin(), order.end(), [](const ScatterPoint* point) { return point->front; });
  for (const ScatterPoint* point : order) {
    const std::string name = printable(point->name, 60);
    const double x = frame.x(point->x), y = frame.y(point->y), length = kLetter * double(name.size());
    struct Place {
      double x, y;
      const char* anchor;
    };
    for (const auto& [at_x, at_y, anchor] :
         {Place{x + 8, y + 4, "start"}, Place{x + 7, y - 7, "start"}, Place{x + 7, y + 16, "start"},
          Place{x - 8, y + 4, "end"}, Place{x - 7, y - 7, "end"}, Place{x - 7, y + 16, "end"}}) {
      const double left = *anchor == 's' ? at_x : at_x - length;
      const Box box{left, at_y - 11, left + length, at_y + 3};
      if (left < 0 || box.right > width || box.top < frame.top - 8) continue;
      if (std::any_of(taken.begin(), taken.end(), [&](const Box& other) { return box.meets(other); })) continue;
      write_text(out, at_x, at_y, anchor, "", name);
      taken.push_back(box);
      break;
    }
  }
}

void draw_front(Markup& out, const std::vector<const ScatterPoint*>& points, const Frame& frame) {
  std::vector<std::pair<double, double>> front;
  for (const ScatterPoint* point : points)
    if (point->front) front.emplace_back(point->x, point->y);
  std::sort(front.begin(), front.end());
  if (front.size() > 1) out.empty("path", {{"d", path_of(front, frame)}, {"class", "front"}});
}

void draw_point(Markup& out, const ScatterPoint& point, const Frame& frame) {
  const double x = frame.x(point.x), y = frame.y(point.y);
  if (point.x_deviation > 0)
    draw_line(out, frame.x(point.x - point.x_deviation), y, frame.x(point.x + point.x_deviation), y, "s0");
  if (point.y_deviation > 0)
    draw_line(out, x, frame.y(point.y - point.y_deviation), x, frame.y(point.y + point.y_deviation), "s0");
  out.open("circle",
           {{"cx", x}, {"cy", y}, {"r", 4.5}, {"stroke-width", 2.0}, {"class", point.front ? "s0 f0" : "s0 hollow"}});
  out.element("title", point.name + ": " + significant(point.y) + " at " + significant(point.x));
  out.close();
}

}  // namespace

std::vector<double> axis_ticks(double low, double high) {
  constexpr double kTiny = 1e-100;
  if (!(high - low > std::max(std::abs(low) * 1e-6, kTiny))) {  // a single value, or as good as one
    const double margin = std::abs(low) < kTiny ? 1 : std::abs(low) * 0.1;
    low -= margin;
    high += margin;
  }
  const double rough = (high - low) / 5, power = std::pow(10, std::floor(std::log10(rough)));
  const double step = power * (rough / power < 1.5 ? 1 : rough / power < 3.5 ? 2 : rough / power < 7.5 ? 5 : 10);
  // A hair of tolerance: 0.3 / 0.1 is more than 3.
  const double first = std::floor(low / step + 1e-9), last = std::ceil(high / step - 1e-9);
  std::vector<double> ticks;
  for (int i = 0; i <= int(last - first); ++i) ticks.push_back((first + i) * step);
  return ticks;
}

void draw(Markup& out, const LineChart& chart) {
  constexpr double kWidth = 560, kHeight = 290;
  const std::vector<Series> all = drawable_series(chart);
  Range x, y;
  for (const Series& series : all) {
    for (const auto& [at_x, at_y] : series.points) x.add(at_x), y.add(at_y);
  }
  const Frame frame{
      .left = 70, .top = 46, .right = kWidth - 24, .bottom = kHeight - 44, .x_ticks = x.ticks(), .y_ticks = y.ticks()};
  const double legend = all.size() > 1 ? 10 + 18 * double(all.size()) : 0;
  out.open_svg(kWidth, kHeight + legend, chart.title, chart.description);
  draw_frame(out, frame, chart.title, chart.x_label, chart.y_label);
  for (size_t i = 0; i < all.size(); ++i) {
    out.empty("path", {{"d", path_of(all[i].points, frame)},
                       {"class", "curve " + class_of("s", i)},
                       {"stroke-dasharray", dashes_of(i)},
                       {"stroke-width", all[i].marks ? 1.0 : 2.0}});
    if (all[i].marks || all[i].points.size() == 1) draw_marks(out, all[i], frame, i);
  }
  if (all.size() > 1) draw_legend(out, all, frame.left, kHeight + 8);
  out.close();
}

void draw(Markup& out, const ScatterChart& chart) {
  constexpr double kWidth = 720, kHeight = 420;
  Range x, y;
  x.add(0);
  std::vector<const ScatterPoint*> points;
  for (const ScatterPoint& point : chart.points) {
    if (!drawable(point.x) || !drawable(point.y)) continue;
    points.push_back(&point);
    x.add(point.x + point.x_deviation);
    for (const double side : {-1.0, 1.0}) y.add(point.y + side * point.y_deviation);
  }
  const Frame frame{
      .left = 70, .top = 50, .right = kWidth - 24, .bottom = kHeight - 44, .x_ticks = x.ticks(), .y_ticks = y.ticks()};
  out.open_svg(kWidth, kHeight, chart.title, chart.description);
  draw_frame(out, frame, chart.title, chart.x_label, chart.y_label);
  draw_front(out, points, frame);
  for (const ScatterPoint* point : points) draw_point(out, *point, frame);
  draw_names(out, points, frame, kWidth);
  out.close();
}

void draw(Markup& out, const MatrixChart& chart) {
  const auto count = double(chart.names.size());
  const double cell = std::clamp(600 / std::max(1.0, count), 9.0, 44.0), margin = 150, side = cell * count;
  std::vector<int64_t> totals(chart.names.size(), 0);
  for (const auto& [place, images] : chart.counts) totals[size_t(place.first)] += images;
  out.open_svg(margin + side + 70, margin + side + 10, chart.title, chart.description);
  write_text(out, 4, 16, "start", "", chart.title);
  write_text(out, 4, 34, "start", "dim", "rows: " + chart.row_label + ", columns: " + chart.column_label);
  for (size_t i = 0; i < chart.names.size(); ++i) {
    const double middle = margin + cell * (double(i) + 0.5);
    const std::string name = printable(chart.names[i], 18);
    write_text(out, margin - 6, middle + 4, "end", "", name);
    out.element("text",
                {{"transform", "translate(" + decimal(middle + 4, 2) + " " + decimal(margin - 6, 2) + ") rotate(-60)"}},
                name);
  }
  out.empty("rect", {{"x", margin}, {"y", margin}, {"width", side}, {"height", side}, {"class", "grid"}});
  for (const auto& [place, images] : chart.counts) {
    const auto [row, column] = place;
    const double x = margin + cell * double(column), y = margin + cell * double(row);
    const double share = double(images) / double(std::max<int64_t>(1, totals[size_t(row)]));
    out.open("rect", {{"x", x},
                      {"y", y},
                      {"width", cell},
                      {"height", cell},
                      {"class", row == column ? "f0" : "f1"},
                      {"fill-opacity", 0.08 + 0.62 * share}});
    out.element("title", chart.names[size_t(row)] + ", taken for " + chart.names[size_t(column)] + ": " +
                             std::to_string(images) + " (" + percent(share) + " of the row)");
    out.close();
    if (cell >= 22) write_text(out, x + cell / 2, y + cell / 2 + 4, "middle", "", std::to_string(images));
  }
  out.close();
}

}  // namespace pyra::io
