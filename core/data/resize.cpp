// Pillow's resampling in 8 bits, reimplemented from its definition: each output pixel is a weighted sum over the
// input pixels within the (scaled) support of Keys' cubic, a = -0.5 ("Cubic convolution interpolation for digital
// image processing", 1981, eq. 15); weights are rounded to 22 bits, and each of the two passes rounds to 8 bits.
#include <cmath>

#include "base/error.h"
#include "data/image.h"

namespace pyra::data {
namespace {

constexpr int kFractionBits = 22;
constexpr double kSupport = 2.0;

double cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

/// For each output position: the first input position, how many, and their weights.
struct Filter {
  int64_t taps = 0;  ///< row length of `weights`
  std::vector<int64_t> first, count;
  std::vector<int32_t> weights;  ///< [out, taps], scaled by 2^22
};

Filter make_filter(int64_t in, int64_t out) {
  const double scale = double(in) / double(out), stretch = std::max(scale, 1.0), support = kSupport * stretch;
  Filter filter;
  filter.taps = int64_t(std::ceil(support)) * 2 + 1;
  filter.first.resize(size_t(out));
  filter.count.resize(size_t(out));
  filter.weights.resize(size_t(out * filter.taps));
  std::vector<double> exact(static_cast<size_t>(filter.taps));
  for (int64_t i = 0; i < out; ++i) {
    const double centre = (double(i) + 0.5) * scale;
    const int64_t first = std::max<int64_t>(int64_t(std::floor(centre - support + 0.5)), 0);
    const int64_t count = std::min(int64_t(std::floor(centre + support + 0.5)), in) - first;
    double sum = 0;
    // The inverse is multiplied, not divided by: the last bit of the double decides some roundings.
    for (int64_t k = 0; k < count; ++k)
      sum += exact[size_t(k)] = cubic((double(k + first) - centre + 0.5) * (1.0 / stretch));
    for (int64_t k = 0; k < count; ++k) {
      const double weight = (sum != 0 ? exact[size_t(k)] / sum : exact[size_t(k)]) * (1 << kFractionBits);
      filter.weights[size_t(i * filter.taps + k)] = int32_t(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
    filter.first[size_t(i)] = first;
    filter.count[size_t(i)] = count;
  }
  return filter;
}

uint8_t to_byte(int32_t sum) {
  return uint8_t(std::clamp(sum >> kFractionBits, 0, 255));
}

constexpr int32_t kHalf = 1 << (kFractionBits - 1);

Image resize_rows(const Image& image, int64_t width) {
  const Filter filter = make_filter(image.width, width);
  Image out{image.height, width, std::vector<uint8_t>(size_t(image.height * width * 3))};
  for (int64_t y = 0; y < image.height; ++y) {
    const uint8_t* const row = image.pixels.data() + y * image.width * 3;
    uint8_t* to = out.pixels.data() + y * width * 3;
    for (int64_t x = 0; x < width; ++x, to += 3) {
      const uint8_t* from = row + filter.first[size_t(x)] * 3;
      const int32_t* const weights = filter.weights.data() + x * filter.taps;
      int32_t r = kHalf, g = kHalf, b = kHalf;
      for (int64_t k = 0; k < filter.count[size_t(x)]; ++k, from += 3) {
        r += weights[k] * from[0];
        g += weights[k] * from[1];
        b += weights[k] * from[2];
      }
      to[0] = to_byte(r), to[1] = to_byte(g), to[2] = to_byte(b);
    }
  }
  return out;
}

Image resize_columns(const Image& image, int64_t height) {
  const Filter filter = make_filter(image.height, height);
  const int64_t line = image.width * 3;
  Image out{height, image.width, std::vector<uint8_t>(size_t(height * line))};
  std::vector<int32_t> sums(static_cast<size_t>(line));
  for (int64_t y = 0; y < height; ++y) {
    std::fill(sums.begin(), sums.end(), kHalf);
    for (int64_t k = 0; k < filter.count[size_t(y)]; ++k) {
      const uint8_t* const from = image.pixels.data() + (filter.first[size_t(y)] + k) * line;
      const int32_t weight = filter.weights[size_t(y * filter.taps + k)];
      for (int64_t i = 0; i < line; ++i) sums[size_t(i)] += weight * from[i];
    }
    uint8_t* const to = out.pixels.data() + y * line;
    for (int64_t i = 0; i < line; ++i) to[i] = to_byte(sums[size_t(i)]);
  }
  return out;
}

}  // namespace

Image resize_bicubic(const Image& image, int64_t height, int64_t width) {
  if (height < 1 || width < 1 || image.height < 1 || image.width < 1) {
    fail(ExitCode::internal, "resize of ", image.width, " x ", image.height, " to ", width, " x ", height, " pixels");
  }
  if (height == image.height && width == image.width) return image;
  if (height == image.height) return resize_rows(image, width);
  if (width == image.width) return resize_columns(image, height);
  // Rounding between the passes makes their order visible. Pillow 13 begins with the height when that shrinks much more
  // than the width; older ones always begin with the width.
  const bool columns_first = image.height > height && image.height - height > 2 * (image.width - width);
  return columns_first ? resize_rows(resize_columns(image, height), width)
                       : resize_columns(resize_rows(image, width), height);
}

}  // namespace pyra::data
