// What one batch at a time passes along: streams, memory for its activations, and captured graphs by number of images
// and company.
#pragma once
#include <map>
#include <memory>
#include <utility>

#include "engine/cuda/forward.h"
#include "engine/cuda/graph.h"

namespace pyra::engine {

class Lane {
 public:
  Lane(const nn::Vit& model, const DeviceModel& device_model, const nn::Preprocess& preprocess, bool exact_gelu,
       std::shared_ptr<kernels::cuda::GemmCache> cache);

  /// The number of images that it has memory for.
  [[nodiscard]] int room() const { return activations_.batch; }
  [[nodiscard]] size_t bytes() const { return Activations::bytes_for(model_, room()); }
  /// Gives memory back, and the graphs that point into it; waits for what is under way.
  void clear();
  /// Takes memory for so many images, in place of less.
  void make_room(int images);

  /// `beside`, here and below: another lane is under way at the same time.
  [[nodiscard]] bool captured(int images, bool beside) const { return graphs_.contains(key(images, beside)); }
  /// Chooses the algorithms of matrix products by timing, so no other lane may be under way now. images <= room().
  void capture(int images, bool beside);

  /// Images to patches. Like all below: on the lane's stream, without waiting for it.
  void read_images(const DeviceImages& source, int images);
  /// Patches to logits, of a number of images that was captured.
  void launch(int images, bool beside);
  /// Logits [images,classes] fp32 of the last launch on the device.
  [[nodiscard]] const float* logits() const { return activations_.logits.get<float>(); }
  [[nodiscard]] cudaStream_t stream() const { return forward_.stream(); }

  /// Each step of a pass alone, into the timer.
  void profile(int images, StageTimer& timer) { forward_.enqueue_timed(images, activations_, timer); }
  /// Throws what a third party's plan() threw since the last call.
  void check_host_plans();
  void forget_host_plans() { (void)forward_.take_failure(); }

 private:
  using Key = std::pair<int, bool>;
  [[nodiscard]] Key key(int images, bool beside) const { return {images, beside && forward_.minds_company(images)}; }

  const DeviceModel& model_;
  std::shared_ptr<kernels::cuda::GemmCache> cache_;
  Forward forward_;
  Activations activations_;
  std::map<Key, Graph> graphs_;
};

}  // namespace pyra::engine
