#include "data/survey.h"

#include <algorithm>
#include <cstring>

#include "data/decode_pool.h"
#include "data/image.h"

namespace pyra::data {
namespace {

/// Two multiply-and-shift lanes with odd constants (of the golden ratio and of pi), eight bytes a turn.
class Mixer {
 public:
  void add(uint64_t word) {
    high_ = (high_ ^ word) * 0x9e3779b97f4a7c15;
    high_ ^= high_ >> 32;
    low_ = (low_ + word) * 0x243f6a8885a308d3;
    low_ ^= low_ >> 29;
  }
  void add(const std::vector<uint8_t>& bytes) {
    size_t at = 0;
    for (; at + 8 <= bytes.size(); at += 8) {
      uint64_t word;
      std::memcpy(&word, bytes.data() + at, 8);
      add(word);
    }
    for (; at < bytes.size(); ++at) add(uint64_t{bytes[at]});
  }
  [[nodiscard]] Digest digest() const { return {high_, low_}; }

 private:
  uint64_t high_ = 1, low_ = 2;
};

bool is_one_colour(const std::vector<uint8_t>& pixels) {
  // Each byte equals the one a pixel before it.
  return pixels.size() < 6 || std::memcmp(pixels.data(), pixels.data() + 3, pixels.size() - 3) == 0;
}

Look look_at(const Image& image) {
  Mixer mixer;
  mixer.add(uint64_t(image.height));
  mixer.add(uint64_t(image.width));
  mixer.add(image.pixels);
  return {.problem = {},
          .height = image.height,
          .width = image.width,
          .one_colour = is_one_colour(image.pixels),
          .digest = mixer.digest()};
}

}  // namespace

std::vector<Look> survey(const Dataset& dataset, const std::vector<Sample>& samples, Progress& progress) {
  std::vector<Look> looks(samples.size());
  const auto work = [&](int64_t i) {
    const Sample& sample = samples[size_t(i)];
    looks[size_t(i)] = look_at(decode(dataset.read(sample), dataset.describe(sample)));
  };
  progress.begin("decode", int64_t(samples.size()), "image");
  std::vector<std::string> problems = for_each_image(int64_t(samples.size()), false, work, progress);
  progress.end();
  for (size_t i = 0; i < looks.size(); ++i) looks[i].problem = std::move(problems[i]);
  return looks;
}

}  // namespace pyra::data
