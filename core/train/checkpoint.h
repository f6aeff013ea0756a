// A run's recovery state on disk: `last.safetensors`, and the one before it as `previous.safetensors`.
#pragma once
#include <filesystem>
#include <optional>
#include <string>

#include "base/progress.h"
#include "train/loop.h"

namespace pyra::train {

struct Checkpoint {
  Position position;
  sdk::TensorMap tensors;  ///< Loop::state()
  std::string task;        ///< a JSON text that the task keeps beside it: what it has done before, whose run it is
};

/// Atomic; there is no moment without a whole last checkpoint. Creates the folder. Error(output).
void write_checkpoint(const std::filesystem::path& folder, const Checkpoint& checkpoint);

/// The last one, or, with a note saying why, the previous one when the last cannot be read. None when there is no
/// checkpoint at all; Error(input) when none can be read.
[[nodiscard]] std::optional<Checkpoint> read_checkpoint(const std::filesystem::path& folder,
                                                        Progress& progress = silent_progress());

}  // namespace pyra::train
