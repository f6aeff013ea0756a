#include "engine/cuda/memory_plan.h"

#include <algorithm>
#include <numeric>

namespace pyra::engine {

size_t MemoryPlan::add(size_t bytes, int first, int last) {
  buffers_.push_back({.bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment, .first = first, .last = last});
  return buffers_.size() - 1;
}

/// `placed` are in the order of their offsets.
size_t MemoryPlan::lowest_free(const Buffer& buffer, const std::vector<const Buffer*>& placed) const {
  size_t at = 0;
  for (const Buffer* other : placed) {
    if (other->last < buffer.first || buffer.last < other->first) continue;
    if (at + buffer.bytes <= other->offset) break;
    at = std::max(at, other->offset + other->bytes);
  }
  return at;
}

void MemoryPlan::place() {
  std::vector<size_t> order(buffers_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return buffers_[a].bytes > buffers_[b].bytes; });
  std::vector<const Buffer*> placed;
  bytes_ = 0;
  for (const size_t i : order) {
    Buffer& buffer = buffers_[i];
    if (buffer.bytes == 0) continue;
    buffer.offset = lowest_free(buffer, placed);
    bytes_ = std::max(bytes_, buffer.offset + buffer.bytes);
    const auto after = std::upper_bound(placed.begin(), placed.end(), &buffer,
                                        [](const Buffer* a, const Buffer* b) { return a->offset < b->offset; });
    placed.insert(after, &buffer);
  }
}

size_t MemoryPlan::least_bytes() const {
  size_t most = 0;
  for (const Buffer& now : buffers_) {  // the most is needed when one of them begins to be
    size_t sum = 0;
    for (const Buffer& other : buffers_)
      if (other.first <= now.first && now.first <= other.last) sum += other.bytes;
    most = std::max(most, sum);
  }
  return most;
}

}  // namespace pyra::engine
