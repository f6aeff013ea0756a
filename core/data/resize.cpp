// Pillow's resampling in 8 bits, reimplemented from its definition: each output pixel is a weighted sum over the
// input pixels within the (scaled) support of Keys' cubic, a = -0.5 ("Cubic convolution interpolation for digital
// image processing", 1981, eq. 15); weights are rounded to 22 bits, and each of the two passes rounds to 8 bits.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>

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

constexpr int32_t kHalf = 1 << (kFractionBits - 1);

/// to[i] = sum over k of weights[k] from[k pitch + i], rounded, for first <= i < count.
void weigh_one_by_one(const uint8_t* from, int64_t pitch, const int32_t* weights, int64_t taps, int64_t first,
                      int64_t count, uint8_t* to) {
  for (int64_t i = first; i < count; ++i) {
    int32_t sum = kHalf;
    for (int64_t k = 0; k < taps; ++k) sum += weights[k] * from[k * pitch + i];
    to[i] = uint8_t(std::clamp(sum >> kFractionBits, 0, 255));
  }
}

constexpr int64_t kBlock = 48;  ///< bytes that are summed up together

#ifdef __x86_64__
constexpr int kLanes = 8, kVectors = kBlock / kLanes;

/// Of whole blocks; sums of integers are exact in any order. How many bytes were done.
__attribute__((target("avx2"))) int64_t weigh_avx2(const uint8_t* from, int64_t pitch, const int32_t* weights,
                                                   int64_t taps, int64_t count, uint8_t* to) {
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    __m256i sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = _mm256_set1_epi32(kHalf);
    for (int64_t k = 0; k < taps; ++k) {
      const __m256i weight = _mm256_set1_epi32(weights[k]);
      const uint8_t* const at = from + k * pitch + i;
      for (int v = 0; v < kVectors; ++v) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + v * kLanes));
        sums[v] = _mm256_add_epi32(sums[v], _mm256_mullo_epi32(_mm256_cvtepu8_epi32(bytes), weight));
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const __m256i sum = _mm256_srai_epi32(sums[v], kFractionBits);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i + v * kLanes), _mm_packus_epi16(words, words));
    }
  }
  return i;
}
#endif

/// As weigh_one_by_one, from 0 on.
void weigh(const uint8_t* from, int64_t pitch, const int32_t* weights, int64_t taps, int64_t count, uint8_t* to) {
  int64_t done = 0;
#ifdef __x86_64__
  static const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2) done = weigh_avx2(from, pitch, weights, taps, count, to);
#endif
  weigh_one_by_one(from, pitch, weights, taps, done, count, to);
}

constexpr int64_t kRows = kBlock / 3;  ///< that are resized together, a pixel of each beside one another

/// Pixel x of `rows` rows of an image, one behind the other, for every x.
void interleave(const Image& image, int64_t first, int64_t rows, std::vector<uint8_t>& pixels) {
  const int64_t line = image.width * 3;
  const uint8_t* const from = image.pixels.data() + first * line;
  for (int64_t x = 0; x < image.width; ++x) {
    uint8_t* const to = pixels.data() + x * kBlock;
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + 3 * r, from + r * line + 3 * x, 3);
  }
}

Image resize_rows(const Image& image, int64_t width) {
  const Filter filter = make_filter(image.width, width);
  Image out{image.height, width, std::vector<uint8_t>(size_t(image.height * width * 3))};
  std::vector<uint8_t> pixels(size_t(image.width * kBlock));
  uint8_t resized[kBlock];
  for (int64_t first = 0; first < image.height; first += kRows) {
    const int64_t rows = std::min(kRows, image.height - first);
    interleave(image, first, rows, pixels);
    for (int64_t x = 0; x < width; ++x) {
      const auto at = size_t(x);
      weigh(pixels.data() + filter.first[at] * kBlock, kBlock, filter.weights.data() + x * filter.taps,
            filter.count[at], kBlock, resized);
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(out.pixels.data() + ((first + r) * width + x) * 3, resized + 3 * r, 3);
    }
  }
  return out;
}

Image resize_columns(const Image& image, int64_t height) {
  const Filter filter = make_filter(image.height, height);
  const int64_t line = image.width * 3;
  Image out{height, image.width, std::vector<uint8_t>(size_t(height * line))};
  for (int64_t y = 0; y < height; ++y) {
    const auto at = size_t(y);
    weigh(image.pixels.data() + filter.first[at] * line, line, filter.weights.data() + y * filter.taps,
          filter.count[at], line, out.pixels.data() + y * line);
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
