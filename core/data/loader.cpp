#include "data/loader.h"

#include <cmath>
#include <span>

#include "base/error.h"
#include "base/philox.h"
#include "data/decode_pool.h"
#include "data/image.h"
#include "nn/config.h"

namespace pyra::data {
namespace {

constexpr int64_t kMaxCacheBytes = int64_t(32) << 30;

at::Tensor allocate_cache(int64_t count, int64_t size, const std::string& split) {
  if (size < 1 || size > nn::kMaxImageSize)
    fail(ExitCode::input, "preprocessing to ", size, " pixels; expected 1 to ", nn::kMaxImageSize);
  const int64_t bytes = count * size * size * 3;
  if (bytes > kMaxCacheBytes) {
    fail(ExitCode::device, "split ", split, ": ", count, " images of ", size, " x ", size, " pixels need ", bytes >> 30,
         " GiB of memory; at most ", kMaxCacheBytes >> 30, " GiB are kept decoded: use fewer images or a smaller size");
  }
  return at::empty({count, size, size, 3}, at::kByte);
}

/// Closes the gaps that bad images left, without a second copy of the set.
void drop_bad(ImageSet& set, const std::vector<std::string>& reasons) {
  const int64_t row = set.images.stride(0);
  uint8_t* const pixels = set.images.data_ptr<uint8_t>();
  int64_t* const labels = set.labels.data_ptr<int64_t>();
  int64_t kept = 0;
  std::vector<std::string> paths;
  for (int64_t i = 0; i < int64_t(reasons.size()); ++i) {
    if (!reasons[size_t(i)].empty()) {
      set.skipped.push_back({set.paths[size_t(i)], reasons[size_t(i)]});
      continue;
    }
    if (kept != i) std::copy_n(pixels + i * row, row, pixels + kept * row);
    labels[kept++] = labels[i];
    paths.push_back(std::move(set.paths[size_t(i)]));
  }
  set.paths = std::move(paths);
  set.images = set.images.narrow(0, 0, kept);
  set.labels = set.labels.narrow(0, 0, kept);
}

/// Draws for one image of one epoch: words of its own, so the order and number of threads do not matter.
class Draws {
 public:
  Draws(uint64_t seed, int64_t epoch, int64_t index)
      : random_(seed, RandomStream::augment, uint64_t(epoch)), first_(uint64_t(index) * kBlocks) {}
  /// Uniform in [0,1): number `word` (0..3) of block `block` (0..15).
  [[nodiscard]] float uniform(uint64_t block, uint64_t word) const {
    return random_.uniform((first_ + block) * 4 + word);
  }

 private:
  static constexpr uint64_t kBlocks = 16;
  Philox random_;
  uint64_t first_;
};

constexpr uint64_t kCropAttempts = 10, kFlipBlock = 15;

/// A part of random area (0.08..1) and ratio (3/4..4/3, log-uniform), as in "Going deeper with convolutions" (Szegedy
/// et al., 2015, section 6) and as torchvision draws it: ten attempts, then the whole image.
Image random_resized_crop(const Image& image, const Draws& draws) {
  for (uint64_t attempt = 0; attempt < kCropAttempts; ++attempt) {
    const double area = double(image.height * image.width) * (0.08 + 0.92 * double(draws.uniform(attempt, 0)));
    const double log_ratio = std::log(4.0 / 3.0) * (2 * double(draws.uniform(attempt, 1)) - 1);
    const int64_t width = std::lround(std::sqrt(area * std::exp(log_ratio)));
    const int64_t height = std::lround(std::sqrt(area * std::exp(-log_ratio)));
    if (width < 1 || height < 1 || width > image.width || height > image.height) continue;
    const int64_t top = int64_t(double(draws.uniform(attempt, 2)) * double(image.height - height + 1));
    const int64_t left = int64_t(double(draws.uniform(attempt, 3)) * double(image.width - width + 1));
    return resize_bicubic(crop(image, top, left, height, width), image.height, image.width);
  }
  return image;
}

void flip(Image& image) {
  for (int64_t y = 0; y < image.height; ++y) {
    uint8_t* const row = image.pixels.data() + y * image.width * 3;
    for (int64_t left = 0, right = image.width - 1; left < right; ++left, --right) {
      std::swap_ranges(row + left * 3, row + left * 3 + 3, row + right * 3);
    }
  }
}

Image augmented(const uint8_t* pixels, int64_t size, const Augment& augment, const Draws& draws) {
  Image image{size, size, {pixels, pixels + size * size * 3}};
  if (augment.random_resized_crop) image = random_resized_crop(image, draws);
  if (augment.hflip && draws.uniform(kFlipBlock, 0) < 0.5f) flip(image);
  return image;
}

}  // namespace

namespace {

/// These samples of the split; those that are bad are in `skipped`, and may be all.
ImageSet decode_samples(const Dataset& dataset, const std::string& split, std::span<const Sample> samples,
                        const nn::Preprocess& preprocess, BadImages bad, Progress& progress) {
  const auto count = int64_t(samples.size());
  ImageSet set{.images = allocate_cache(count, preprocess.size, split),
               .labels = at::empty({count}, at::kLong),
               .paths = {},
               .skipped = {}};
  for (int64_t i = 0; i < count; ++i) {
    set.labels.data_ptr<int64_t>()[i] = samples[size_t(i)].label;
    set.paths.push_back(samples[size_t(i)].path);
  }
  uint8_t* const pixels = set.images.data_ptr<uint8_t>();
  const int64_t row = set.images.stride(0);
  const auto decode_one = [&](int64_t i) {
    const Sample& sample = samples[size_t(i)];
    const Image image = prepare(decode(dataset.read(sample), dataset.describe(sample)), preprocess);
    std::copy(image.pixels.begin(), image.pixels.end(), pixels + i * row);
  };
  const std::vector<std::string> reasons = for_each_image(count, bad == BadImages::fail, decode_one, progress);
  const auto wrong = std::ranges::find_if(reasons, [](const std::string& reason) { return !reason.empty(); });
  if (wrong == reasons.end()) return set;
  if (bad == BadImages::fail) fail(ExitCode::input, *wrong, "; --bad-images skip leaves such images out");
  drop_bad(set, reasons);
  return set;
}

void check_not_empty(const Dataset& dataset, const std::string& split) {
  if (dataset.split(split).empty())
    fail(ExitCode::input, dataset.path().string(), ": split ", split, " holds no images");
}

[[noreturn]] void fail_all_bad(int64_t count, const std::string& split, const std::string& reason) {
  fail(ExitCode::input, "none of the ", count, " images of split ", split, " can be read; the first: ", reason);
}

}  // namespace

ImageSet load_split(const Dataset& dataset, const std::string& split, const nn::Preprocess& preprocess, BadImages bad,
                    Progress& progress) {
  check_not_empty(dataset, split);
  const int64_t count = int64_t(dataset.split(split).size());
  progress.begin(cat("decode ", split), count, "image");
  ImageSet set = decode_samples(dataset, split, dataset.split(split), preprocess, bad, progress);
  progress.end();
  if (set.labels.size(0) == 0) fail_all_bad(count, split, set.skipped[0].reason);
  return set;
}

ImageSet load_some(const Dataset& dataset, const std::string& split, int64_t count, const nn::Preprocess& preprocess,
                   BadImages bad) {
  check_not_empty(dataset, split);
  const std::vector<Sample>& all = dataset.split(split);
  const auto total = int64_t(all.size()), wanted = std::min(count, total);
  std::vector<Sample> samples;
  samples.reserve(size_t(wanted));
  for (int64_t i = 0; i < wanted; ++i) samples.push_back(all[size_t((i * total + wanted - 1) / wanted)]);
  ImageSet set = decode_samples(dataset, split, samples, preprocess, bad, silent_progress());
  if (set.labels.size(0) == 0) fail_all_bad(wanted, split, set.skipped[0].reason);
  return set;
}

SplitReader::SplitReader(const Dataset& dataset, std::string split, const nn::Preprocess& preprocess, BadImages bad)
    : dataset_(dataset), split_(std::move(split)), preprocess_(preprocess), bad_(bad) {
  check_not_empty(dataset_, split_);
  total_ = int64_t(dataset_.split(split_).size());
}

std::optional<ImageSet> SplitReader::next(int64_t count) {
  while (taken_ < total_) {
    const int64_t first = taken_;
    taken_ = std::min(total_, taken_ + count);
    const std::span<const Sample> samples =
        std::span(dataset_.split(split_)).subspan(size_t(first), size_t(taken_ - first));
    ImageSet set = decode_samples(dataset_, split_, samples, preprocess_, bad_, silent_progress());
    good_ += set.labels.size(0);
    if (first_reason_.empty() && !set.skipped.empty()) first_reason_ = set.skipped[0].reason;
    if (set.labels.size(0) > 0 || taken_ < total_ || good_ > 0) return set;
  }
  if (good_ == 0) fail_all_bad(total_, split_, first_reason_);
  return std::nullopt;
}

std::vector<int64_t> epoch_order(int64_t n, uint64_t seed, int64_t epoch) {
  return Philox(seed, RandomStream::shuffle, uint64_t(epoch)).permutation(n);
}

Batch make_batch(const ImageSet& set, const std::vector<int64_t>& indices, const nn::Preprocess& preprocess,
                 const Augment& augment, uint64_t seed, int64_t epoch) {
  const int64_t count = int64_t(indices.size()), size = set.images.size(1), values = size * size * 3;
  for (const int64_t index : indices) {
    if (index < 0 || index >= set.images.size(0)) {
      fail(ExitCode::internal, "make_batch: image ", index, " of a set of ", set.images.size(0));
    }
  }
  Batch batch{at::empty({count, 3, size, size}, at::kFloat), at::empty({count}, at::kLong)};
  const nn::NormaliseTables tables = nn::normalise_tables(preprocess);
  const uint8_t* const from = set.images.const_data_ptr<uint8_t>();
  const int64_t* const labels = set.labels.const_data_ptr<int64_t>();
  float* const to = batch.images.data_ptr<float>();
  int64_t* const to_labels = batch.labels.data_ptr<int64_t>();
  const bool augments = augment.hflip || augment.random_resized_crop;
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = indices[size_t(i)];
      const uint8_t* pixels = from + index * values;
      Image image;
      if (augments) {
        image = augmented(pixels, size, augment, Draws(seed, epoch, index));
        pixels = image.pixels.data();
      }
      nn::normalise_image(pixels, to + i * values, size * size, tables);
      to_labels[i] = labels[index];
    }
  });
  return batch;
}

}  // namespace pyra::data
