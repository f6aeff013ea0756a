#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace pyra::train {

double learning_rate(const Schedule& schedule, int64_t epoch) {
  const double e = double(std::clamp<int64_t>(epoch, 0, std::max<int64_t>(schedule.epochs, 0)));
  if (e < double(schedule.warmup_epochs)) {
    return schedule.warmup_lr + (schedule.peak - schedule.warmup_lr) * e / double(schedule.warmup_epochs);
  }
  const double turn = schedule.epochs > 0 ? e / double(schedule.epochs) : 1.0;
  return schedule.min_lr + (schedule.peak - schedule.min_lr) * (1 + std::cos(std::numbers::pi * turn)) / 2;
}

int64_t schedule_epoch(const Schedule& schedule, int64_t epoch, double seconds, double max_seconds) {
  int64_t position = epoch;
  if (max_seconds > 0) {
    const double fraction = std::clamp(seconds / max_seconds, 0.0, 1.0);
    position = std::max(position, int64_t(std::floor(fraction * double(schedule.epochs))));
  }
  return std::clamp<int64_t>(position, 0, std::max<int64_t>(schedule.epochs - 1, 0));
}

}  // namespace pyra::train
