// What a fine-tuning run is asked for, checked and made ready: before any model is read or anything is written.
#pragma once
#include "tasks/finetune.h"
#include "train/loop.h"

namespace pyra::tasks {

/// Error(usage) naming the key that makes no sense.
void check_options(const FinetuneOptions& options);
/// Error(usage) for no run folder, or one that holds something and is not to be resumed.
void check_out(const FinetuneOptions& options);

/// A recipe that says nothing of its dtype means fp32 on the CPU and bf16 on a GPU.
[[nodiscard]] engine::Precision precision_of(const io::Recipe& recipe, const std::string& device);
[[nodiscard]] train::LoopSettings loop_settings(const io::Recipe& recipe, const std::string& device, double lr);

/// A schedule that names its goal ("speedup:3.0", "macs:0.4") becomes the counts that schedule_search.h finds for the
/// base model on this device and the recipe's images, so that run.toml repeats the run anywhere; a run that is resumed
/// keeps what it began with. Other options come back as they are.
[[nodiscard]] FinetuneOptions with_found_schedule(const FinetuneOptions& options, const host::PluginRegistry& plugins,
                                                  Progress& progress);

}  // namespace pyra::tasks
