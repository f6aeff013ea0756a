// The learning rate of an epoch: linear warm-up, then a cosine, stepped by epoch (as published: arXiv 2403.09192).
#pragma once
#include <cstdint>

namespace pyra::train {

struct Schedule {
  double peak = 1e-3;       ///< lr
  double warmup_lr = 1e-6;  ///< of epoch 0 when there is a warm-up
  double min_lr = 1e-5;     ///< where the cosine would end, at `epochs`
  int64_t warmup_epochs = 10;
  int64_t epochs = 100;
};

/// lr(e) = warmup_lr + (peak - warmup_lr) e / warmup_epochs            for e < warmup_epochs,
///         min_lr + (peak - min_lr) (1 + cos(pi e / epochs)) / 2       from there on.
/// The cosine counts from epoch 0, so it starts below its peak after a warm-up. e beyond the end stays there.
[[nodiscard]] double learning_rate(const Schedule& schedule, int64_t epoch);

/// The epoch whose rate applies: `epoch` itself, or, under a time limit, the one that stands where the clock stands,
/// floor(epochs * seconds / max_seconds), if that is later. max_seconds 0: no limit. At most epochs - 1.
[[nodiscard]] int64_t schedule_epoch(const Schedule& schedule, int64_t epoch, double seconds, double max_seconds);

}  // namespace pyra::train
