#include "tasks/pipeline.h"

#include "tasks/run_model.h"

namespace pyra::tasks {

void Pipeline::submit(data::ImageSet set) {
  if (int64_t(queue_.size()) == engine_.in_flight()) collect();
  engine_.submit(set.images);
  queue_.push_back(std::move(set));
}

void Pipeline::collect_all() {
  while (!queue_.empty()) collect();
}

std::vector<data::BadImage> Pipeline::run(data::SplitReader& reader, int64_t batch, const std::string& what,
                                          Progress& progress, const std::function<std::string()>& note) {
  std::vector<data::BadImage> skipped;
  int64_t decoded = 0;
  const auto show = [&] { progress.update(decoded, note && images_ > 0 ? note() : ""); };
  progress.begin(what, reader.total(), "images");
  while (std::optional<data::ImageSet> set = reader.next(batch)) {
    stop_if_asked(what);
    decoded += set->labels.size(0) + int64_t(set->skipped.size());
    std::ranges::move(set->skipped, std::back_inserter(skipped));
    if (set->labels.size(0) > 0) submit(std::move(*set));
    show();
  }
  collect_all();
  show();
  progress.end();
  return skipped;
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
