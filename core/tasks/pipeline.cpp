#include "tasks/pipeline.h"

namespace pyra::tasks {

void Pipeline::submit(data::ImageSet set) {
  if (int64_t(queue_.size()) == engine_.in_flight()) collect();
  engine_.submit(set.images);
  queue_.push_back(std::move(set));
}

void Pipeline::collect_all() {
  while (!queue_.empty()) collect();
}

void Pipeline::collect() {
  const at::Tensor logits = engine_.collect();
  images_ += logits.size(0);
  seconds_ += engine_.last_seconds();
  if (first_images_ == 0) first_images_ = images_, first_seconds_ = seconds_;
  take_(queue_.front(), logits);
  queue_.pop_front();
}

double Pipeline::images_per_second() const {
  const bool only = images_ == first_images_;
  return double(only ? images_ : images_ - first_images_) / (only ? seconds_ : seconds_ - first_seconds_);
}

}  // namespace pyra::tasks
