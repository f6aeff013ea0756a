// Decoded, prepared images of one split: all of them, kept as uint8, or a piece at a time; batches in a seeded order.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/progress.h"
#include "data/dataset.h"
#include "data/image_store.h"
#include "nn/preprocess.h"

namespace pyra::data {

/// Some images of a split in memory, prepared: decoded in parallel.
struct ImageSet {
  at::Tensor images;  ///< [n,size,size,3] uint8
  at::Tensor labels;  ///< [n] int64
  std::vector<std::string> paths;
  std::vector<BadImage> skipped;  ///< left out of images and labels, never replaced
};

/// All images of a split, prepared, where they take no memory.
struct StoredSet {
  ImageStore images;
  at::Tensor labels;  ///< [n] int64
  std::vector<BadImage> skipped;
};

/// A set that is in memory already.
[[nodiscard]] StoredSet stored(ImageSet set);

/// Error(input) at the first bad image of the split unless `bad` is skip; then all that were skipped are listed.
/// Decodes on at::get_num_threads() threads, which changes nothing in the result. Error(output) when the disk has no
/// room for the images (data/image_store.h); Error(interrupted or terminated) soon after a signal is pending.
[[nodiscard]] StoredSet load_split(const Dataset& dataset, const std::string& split, const nn::Preprocess& preprocess,
                                   BadImages bad = BadImages::fail, Progress& progress = silent_progress());

/// `count` images (at least 1) spread evenly over the split's list, which is often sorted by class; all of them when it
/// has fewer. Nothing else is decoded. Errors as load_split's; Error(device) for more than 32 GiB.
[[nodiscard]] ImageSet load_some(const Dataset& dataset, const std::string& split, int64_t count,
                                 const nn::Preprocess& preprocess, BadImages bad = BadImages::fail);

/// The images of a split one piece after another, each decoded when it is asked for: memory does not grow with the set,
/// and what runs the piece before may do so meanwhile.
class SplitReader {
 public:
  /// Keeps a reference to `dataset`. Error(input) for a split that is not there or empty.
  SplitReader(const Dataset& dataset, std::string split, const nn::Preprocess& preprocess,
              BadImages bad = BadImages::fail);
  [[nodiscard]] int64_t total() const { return total_; }
  /// The next `count` samples of the split, or what is left of them, without those that are bad and were skipped (it
  /// may be all of them); nothing at the end. Errors as load_some's.
  [[nodiscard]] std::optional<ImageSet> next(int64_t count);

 private:
  const Dataset& dataset_;
  std::string split_;
  nn::Preprocess preprocess_;
  BadImages bad_;
  int64_t total_ = 0, taken_ = 0, good_ = 0;
  std::string first_reason_;
};

struct Augment {
  bool hflip = false;
  /// Scale 0.08..1, ratio 3/4..4/3, bicubic: of the prepared image that is kept, not of the file's.
  bool random_resized_crop = false;
};

/// The order of an epoch: a permutation of 0..n-1 by (seed, epoch); training drops the last incomplete batch.
[[nodiscard]] std::vector<int64_t> epoch_order(int64_t n, uint64_t seed, int64_t epoch);

/// Rows `indices` of the set, augmented by (seed, epoch, index) and by nothing else, normalised: {images [B,3,S,S],
/// labels [B]}.
struct Batch {
  at::Tensor images, labels;
};
[[nodiscard]] Batch make_batch(const StoredSet& set, const std::vector<int64_t>& indices,
                               const nn::Preprocess& preprocess, const Augment& augment, uint64_t seed, int64_t epoch);

}  // namespace pyra::data
