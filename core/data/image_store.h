// The prepared images of a set, decoded once. They lie on disk, in a file without a name: what trains on them takes as
// much memory for a million images as for a thousand, the kernel's page cache keeps what there is room for, and nothing
// is left behind, however the process ends.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "base/descriptor.h"

namespace pyra::data {

/// `size` where a model may have it, Error(input) where none does.
[[nodiscard]] int64_t checked_image_size(int64_t size);

class ImageStore {
 public:
  /// Room for `count` images of size x size in temporary_folder(). Error(output) naming folder and bytes where the disk
  /// has not so many; Error(input) for a size that no model has.
  ImageStore(int64_t count, int64_t size);
  /// Images that are in memory already: [n,S,S,3] uint8, kept as they are.
  explicit ImageStore(const at::Tensor& images);

  [[nodiscard]] int64_t count() const { return count_; }
  [[nodiscard]] int64_t image_size() const { return size_; }
  [[nodiscard]] int64_t image_bytes() const { return size_ * size_ * 3; }

  /// Fills row `row` of the room with image_bytes() of pixels; rows may be filled from several threads. Error(output).
  void write(int64_t row, const uint8_t* pixels);
  /// Leaves in the set what these rows hold, in this order.
  void keep(std::vector<int64_t> rows);

  /// Copies image `index` to image_bytes() at `to`; from several threads if need be. Error(internal) for an index
  /// outside the set.
  void read(int64_t index, uint8_t* to) const;
  /// Images `indices` one after another, read on at::get_num_threads() threads.
  void read(std::span<const int64_t> indices, uint8_t* to) const;
  /// Images first..first+count: [count,S,S,3] uint8.
  [[nodiscard]] at::Tensor range(int64_t first, int64_t count) const;

 private:
  int64_t count_, size_;
  std::filesystem::path folder_;
  Descriptor file_;
  at::Tensor memory_;          // instead of the file
  std::vector<int64_t> rows_;  // of the images, where some rows were left out
};

}  // namespace pyra::data
