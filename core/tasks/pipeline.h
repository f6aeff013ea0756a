// Batches of images on their way through an engine.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "base/progress.h"
#include "data/loader.h"
#include "engine/engine.h"

namespace pyra::tasks {

/// Takes as many batches at once as the engine has in flight, so that who decodes the next one does so while those
/// before compute; results come in order.
class Pipeline {
 public:
  /// Logits [n,classes] fp32 of a set's n images.
  using Take = std::function<void(const data::ImageSet& set, const at::Tensor& logits)>;

  /// Keeps a reference to `engine`.
  Pipeline(engine::Engine& engine, Take take) : engine_(engine), take_(std::move(take)) {}

  /// Gives the oldest batch to `take` first where the engine is full. `set` holds at least one image.
  void submit(data::ImageSet set);
  void collect_all();
  /// Every image of `reader`, `batch` at a time; returns those that were skipped. `what` names it to progress and to
  /// stop_if_asked; `note` is shown beside it once a batch was taken. Errors as SplitReader's and the engine's.
  [[nodiscard]] std::vector<data::BadImage> run(data::SplitReader& reader, int64_t batch, const std::string& what,
                                                Progress& progress, const std::function<std::string()>& note = {});
  /// Of the network alone; without the first batch, which warms up, if there are more. After a batch was collected.
  [[nodiscard]] double images_per_second() const;

 private:
  void collect();

  engine::Engine& engine_;
  Take take_;
  std::deque<data::ImageSet> queue_;
  int64_t images_ = 0, first_images_ = 0;
  double seconds_ = 0, first_seconds_ = 0;
};

}  // namespace pyra::tasks
