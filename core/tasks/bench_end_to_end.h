// Rows of the whole way: from image files to labels, decoding and computing overlapped, as eval does it.
#pragma once
#include <memory>

#include "data/dataset.h"
#include "tasks/assemble.h"
#include "tasks/bench_subject.h"

namespace pyra::tasks {

/// Reads batches of `settings.split` in the order of its list, again and again. An iteration is a batch; its latency
/// goes from its first file read to its labels. The profile has a stage each for reading, decoding and resizing, in
/// milliseconds of one thread for a batch, and for computing: the largest of (a stage / threads) is what limits.
/// Error(input) for a split of fewer images than a batch, and for an image that cannot be decoded.
[[nodiscard]] BenchSubject end_to_end_subject(const std::shared_ptr<const Model>& model,
                                              const std::shared_ptr<const data::Dataset>& dataset,
                                              const BenchSettings& settings, BenchRow row);

}  // namespace pyra::tasks
