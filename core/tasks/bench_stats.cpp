#include "tasks/bench_stats.h"

#include <algorithm>
#include <boost/math/distributions/students_t.hpp>
#include <cmath>
#include <limits>
#include <numbers>
#include <vector>

namespace pyra::tasks {
namespace {

// What makes a median absolute deviation and an interquartile range estimate a normal standard deviation.
constexpr double kMadToSigma = 1.4826;
constexpr double kIqrToSigma = 1 / 1.349;
constexpr double kMaxCorrelation = 0.8;

double median_deviation(std::span<const double> values, double centre) {
  std::vector<double> deviations;
  deviations.reserve(values.size());
  for (double value : values) deviations.push_back(std::abs(value - centre));
  return median(deviations);
}

// Lag-one correlation of values pulled in to three sigma, so that one spike does not hide a slow wander.
double neighbour_correlation(std::span<const double> values, double centre, double sigma) {
  const double n = double(values.size());
  std::vector<double> clipped;
  for (double value : values) clipped.push_back(std::clamp(value - centre, -3 * sigma, 3 * sigma));
  double mean = 0;
  for (double value : clipped) mean += value / n;
  double together = 0, alone = 0;
  for (size_t i = 0; i < clipped.size(); ++i) {
    alone += (clipped[i] - mean) * (clipped[i] - mean);
    if (i > 0) together += (clipped[i] - mean) * (clipped[i - 1] - mean);
  }
  return alone > 0 ? std::clamp(together / alone + 1 / n, 0.0, kMaxCorrelation) : 0;
}

}  // namespace

double median(std::span<const double> values) {
  return quantile(values, 0.5);
}

double quantile(std::span<const double> values, double share) {
  std::vector<double> sorted(values.begin(), values.end());
  std::sort(sorted.begin(), sorted.end());
  const double position = share * double(sorted.size() - 1);
  const size_t below = size_t(position);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (position - double(below)) * (sorted[above] - sorted[below]);
}

double relative_spread(std::span<const double> values) {
  if (values.size() < 2) return 0;
  const double centre = median(values);
  return kMadToSigma * median_deviation(values, centre) / centre;
}

LogEstimate estimate_log(std::span<const double> values, double tail) {
  std::vector<double> logs;
  for (double value : values) logs.push_back(std::log(value));
  const double centre = median(logs);
  const double n = double(logs.size());
  if (logs.size() < 3) return {.log_median = centre, .noise = std::numeric_limits<double>::infinity()};
  const double by_mad = kMadToSigma * median_deviation(logs, centre) * n / (n - 0.8);
  const double by_iqr = kIqrToSigma * (quantile(logs, 0.75) - quantile(logs, 0.25));
  const double sigma = std::max(by_mad, by_iqr);
  const double rho = neighbour_correlation(logs, centre, sigma);
  const double t = boost::math::quantile(boost::math::complement(boost::math::students_t(n - 1), tail));
  const double median_cost = std::sqrt(std::numbers::pi / 2);
  return {.log_median = centre, .noise = t * median_cost * sigma / std::sqrt(n) * std::sqrt((1 + rho) / (1 - rho))};
}

}  // namespace pyra::tasks
