// What all images of a data set are like, without keeping their pixels.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "base/progress.h"
#include "data/dataset.h"

namespace pyra::data {

/// Tells images apart by size and decoded pixels: 128 bits, so two that are equal here are equal.
struct Digest {
  uint64_t high = 0, low = 0;
  auto operator<=>(const Digest&) const = default;
};

struct Look {
  std::string problem;  ///< why the image cannot be read, "" when it can; nothing else is known then
  int64_t height = 0, width = 0;
  bool one_colour = false;
  Digest digest;
};

/// Decodes every sample, in parallel; the answer does not depend on the number of threads. Error(interrupted or
/// terminated) soon after a signal is pending.
[[nodiscard]] std::vector<Look> survey(const Dataset& dataset, const std::vector<Sample>& samples,
                                       Progress& progress = silent_progress());

}  // namespace pyra::data
