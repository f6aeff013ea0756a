#include "data/loader.h"

#include <cmath>
#include <functional>
#include <span>

#include "base/error.h"
#include "base/philox.h"
#include "data/decode_pool.h"
#include "data/image.h"

namespace pyra::data {
namespace {

constexpr int64_t kMaxCacheBytes = int64_t(32) << 30;

at::Tensor allocate_cache(int64_t count, int64_t size, const std::string& split) {
  const int64_t bytes = count * checked_image_size(size) * size * 3;
  if (bytes > kMaxCacheBytes) {
    fail(ExitCode::device, "split ", split, ": ", count, " images of ", size, " x ", size, " pixels need ", bytes >> 30,
         " GiB of memory; at most ", kMaxCacheBytes >> 30, " GiB are kept decoded: use fewer images or a smaller size");
  }
  return at::empty({count, size, size, 3}, at::kByte);
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

Image augmented(Image image, const Augment& augment, const Draws& draws) {
  if (augment.random_resized_crop) image = random_resized_crop(image, draws);
  if (augment.hflip && draws.uniform(kFlipBlock, 0) < 0.5f) flip(image);
  return image;
}

using Put = std::function<void(int64_t, const std::vector<uint8_t>& pixels)>;

/// Gives every sample's prepared image to `put`, from several threads; reasons as for_each_image's.
std::vector<std::string> decode_each(const Dataset& dataset, std::span<const Sample> samples,
                                     const nn::Preprocess& preprocess, BadImages bad, Progress& progress,
                                     const Put& put) {
  const auto decode_one = [&](int64_t i) {
    const Sample& sample = samples[size_t(i)];
    put(i, prepare(decode(dataset.read(sample), dataset.describe(sample)), preprocess).pixels);
  };
  std::vector<std::string> reasons =
      for_each_image(int64_t(samples.size()), bad == BadImages::fail, decode_one, progress);
  const auto wrong = std::ranges::find_if(reasons, [](const std::string& reason) { return !reason.empty(); });
  if (bad == BadImages::fail && wrong != reasons.end())
    fail(ExitCode::input, *wrong, "; --bad-images skip leaves such images out");
  return reasons;
}

/// The samples without a reason against them; the others in `skipped`.
std::vector<int64_t> good_ones(std::span<const Sample> samples, std::vector<std::string> reasons,
                               std::vector<BadImage>& skipped) {
  std::vector<int64_t> good;
  for (size_t i = 0; i < samples.size(); ++i) {
    if (reasons[i].empty())
      good.push_back(int64_t(i));
    else
      skipped.push_back({samples[i].path, std::move(reasons[i])});
  }
  return good;
}

at::Tensor labels_of(std::span<const Sample> samples, const std::vector<int64_t>& chosen) {
  at::Tensor labels = at::empty({int64_t(chosen.size())}, at::kLong);
  for (size_t i = 0; i < chosen.size(); ++i) labels.data_ptr<int64_t>()[i] = samples[size_t(chosen[i])].label;
  return labels;
}

/// These samples of the split; those that are bad are in `skipped`, and may be all.
ImageSet decode_samples(const Dataset& dataset, const std::string& split, std::span<const Sample> samples,
                        const nn::Preprocess& preprocess, BadImages bad, Progress& progress) {
  ImageSet set;
  set.images = allocate_cache(int64_t(samples.size()), preprocess.size, split);
  uint8_t* const pixels = set.images.data_ptr<uint8_t>();
  const int64_t row = set.images.stride(0);
  const auto put = [&](int64_t i, const std::vector<uint8_t>& image) {
    std::copy(image.begin(), image.end(), pixels + i * row);
  };
  const std::vector<int64_t> good =
      good_ones(samples, decode_each(dataset, samples, preprocess, bad, progress, put), set.skipped);
  for (int64_t i = 0; i < int64_t(good.size()); ++i) {  // closes the gaps without a second copy
    set.paths.push_back(samples[size_t(good[size_t(i)])].path);
    if (good[size_t(i)] != i) std::copy_n(pixels + good[size_t(i)] * row, row, pixels + i * row);
  }
  set.images = set.images.narrow(0, 0, int64_t(good.size()));
  set.labels = labels_of(samples, good);
  return set;
}

void check_not_empty(const Dataset& dataset, const std::string& split) {
  if (dataset.split(split).empty())
    fail(ExitCode::input, dataset.path().string(), ": split ", split, " holds no images");
}

[[noreturn]] void fail_all_bad(int64_t count, const Dataset& dataset, const std::string& split,
                               const std::string& reason) {
  const std::string where = split == Dataset::kUnlabelled ? dataset.path().string() : "split " + split;
  fail(ExitCode::input, "none of the ", count, " images of ", where, " can be read; the first: ", reason);
}

}  // namespace

StoredSet stored(ImageSet set) {
  return {.images = ImageStore(set.images), .labels = std::move(set.labels), .skipped = std::move(set.skipped)};
}

StoredSet load_split(const Dataset& dataset, const std::string& split, const nn::Preprocess& preprocess, BadImages bad,
                     Progress& progress) {
  check_not_empty(dataset, split);
  const std::vector<Sample>& samples = dataset.split(split);
  const auto count = int64_t(samples.size());
  StoredSet set{.images = ImageStore(count, preprocess.size), .labels = {}, .skipped = {}};
  progress.begin(cat("decode ", split), count, "image");
  std::vector<std::string> reasons =
      decode_each(dataset, samples, preprocess, bad, progress,
                  [&](int64_t i, const std::vector<uint8_t>& pixels) { set.images.write(i, pixels.data()); });
  progress.end();
  std::vector<int64_t> good = good_ones(samples, std::move(reasons), set.skipped);
  if (good.empty()) fail_all_bad(count, dataset, split, set.skipped[0].reason);
  set.labels = labels_of(samples, good);
  if (!set.skipped.empty()) set.images.keep(std::move(good));
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
  if (set.labels.size(0) == 0) fail_all_bad(wanted, dataset, split, set.skipped[0].reason);
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
  if (good_ == 0) fail_all_bad(total_, dataset_, split_, first_reason_);
  return std::nullopt;
}

std::vector<int64_t> epoch_order(int64_t n, uint64_t seed, int64_t epoch) {
  return Philox(seed, RandomStream::shuffle, uint64_t(epoch)).permutation(n);
}

Batch make_batch(const StoredSet& set, const std::vector<int64_t>& indices, const nn::Preprocess& preprocess,
                 const Augment& augment, uint64_t seed, int64_t epoch) {
  const int64_t count = int64_t(indices.size()), size = set.images.image_size(), values = set.images.image_bytes();
  Batch batch{at::empty({count, 3, size, size}, at::kFloat), at::empty({count}, at::kLong)};
  const nn::NormaliseTables tables = nn::normalise_tables(preprocess);
  const int64_t* const labels = set.labels.const_data_ptr<int64_t>();
  float* const to = batch.images.data_ptr<float>();
  int64_t* const to_labels = batch.labels.data_ptr<int64_t>();
  const bool augments = augment.hflip || augment.random_resized_crop;
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Image image{size, size, std::vector<uint8_t>(size_t(values))};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = indices[size_t(i)];
      image.pixels.resize(size_t(values));
      set.images.read(index, image.pixels.data());
      if (augments) image = augmented(std::move(image), augment, Draws(seed, epoch, index));
      nn::normalise_image(image.pixels.data(), to + i * values, size * size, tables);
      to_labels[i] = labels[index];
    }
  });
  return batch;
}

}  // namespace pyra::data
