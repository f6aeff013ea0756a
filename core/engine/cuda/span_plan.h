// A MemoryPlan whose buffers are the members of a struct.
#pragma once
#include <vector>

#include "engine/cuda/device_memory.h"
#include "engine/cuda/memory_plan.h"

namespace pyra::engine {

class SpanPlan {
 public:
  /// A buffer that is needed from `first` to `last`, both included.
  void add(DeviceSpan& span, size_t bytes, int first, int last) {
    plan_.add(bytes, first, last);
    spans_.push_back(&span);
  }
  void place() { plan_.place(); }

  // Once places are chosen:
  [[nodiscard]] size_t bytes() const { return plan_.bytes(); }
  /// `memory`: bytes() of it on the device, which must outlive the spans.
  void hand_out(char* memory) const {
    for (size_t i = 0; i < spans_.size(); ++i) *spans_[i] = DeviceSpan(memory + plan_.offset(i));
  }

 private:
  MemoryPlan plan_;
  std::vector<DeviceSpan*> spans_;  ///< by the plan's numbers
};

}  // namespace pyra::engine
