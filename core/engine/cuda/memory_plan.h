// Places in one piece of memory for buffers that are not all needed at once: two share a place where the times at which
// they are needed do not meet.
#pragma once
#include <cstddef>
#include <vector>

namespace pyra::engine {

class MemoryPlan {
 public:
  static constexpr size_t kAlignment = 256;  ///< of every place

  /// A buffer that is needed from `first` to `last`, both included; its number, from 0. One of no bytes takes no place.
  size_t add(size_t bytes, int first, int last);
  /// Chooses places: large buffers first, each the lowest that is free for as long as it is needed.
  void place();

  // Once places are chosen:
  [[nodiscard]] size_t bytes() const { return bytes_; }
  [[nodiscard]] size_t offset(size_t buffer) const { return buffers_[buffer].offset; }
  /// The most that is needed at any time, which no choice of places can go below.
  [[nodiscard]] size_t least_bytes() const;

 private:
  struct Buffer {
    size_t bytes = 0;
    int first = 0, last = 0;
    size_t offset = 0;
  };
  [[nodiscard]] size_t lowest_free(const Buffer& buffer, const std::vector<const Buffer*>& placed) const;

  std::vector<Buffer> buffers_;
  size_t bytes_ = 0;
};

}  // namespace pyra::engine
