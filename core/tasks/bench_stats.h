// What repeated measurements say, and how sure they are of it: medians, robust spread, noise.
#pragma once
#include <cstddef>
#include <span>

namespace pyra::tasks {

/// Middle value; mean of the two middle ones for an even count. `values` must not be empty.
[[nodiscard]] double median(std::span<const double> values);

/// Below it lie `share` (0 to 1) of the values; linear between order statistics, as numpy.quantile. Not for no values.
[[nodiscard]] double quantile(std::span<const double> values, double share);

/// Spread relative to the median: 1.4826 * median(|x - median|) / median, which is the coefficient of variation
/// for normal values and does not see a few outliers. 0 for fewer than two values.
[[nodiscard]] double relative_spread(std::span<const double> values);

/// Where the median of a positive quantity lies, on the log scale, so that ratios become differences.
struct LogEstimate {
  double log_median = 0;
  double noise = 0;  ///< half-width of a one-sided interval of confidence 1 - tail; infinite below 3 values
};

/// `values` in the order in which they were taken, all positive. The half-width is
///   noise = t(1 - tail, n - 1) * 1.2533 * s / sqrt(n) * sqrt((1 + rho) / (1 - rho))
/// s:      the larger of 1.4826 MAD * n / (n - 0.8) and IQR / 1.349 of the logs: of two robust standard deviations
///         the one that does not collapse when half of few values agree by chance;
/// 1.2533: sqrt(pi / 2), what a median costs against a mean;
/// rho:    correlation of neighbours (+ 1/n for its bias, within 0 and 0.8): a machine that stays slow for a while
///         makes repetitions agree with one another without making them right.
[[nodiscard]] LogEstimate estimate_log(std::span<const double> values, double tail);

}  // namespace pyra::tasks
