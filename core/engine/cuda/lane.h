// What one batch at a time passes along: streams, memory for its activations, and a captured graph per number of
// images.
#pragma once
#include <map>
#include <memory>

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

  [[nodiscard]] bool captured(int images) const { return graphs_.contains(images); }
  /// Chooses the algorithms of matrix products by timing, so no other lane may be under way. images <= room().
  void capture(int images);

  /// Images to patches. Like all below: on the lane's stream, without waiting for it.
  void read_images(const DeviceImages& source, int images);
  /// Patches to logits, of a number of images that was captured.
  void launch(int images);
  /// Logits [images,classes] fp32 of the last launch on the device.
  [[nodiscard]] const float* logits() const { return activations_.logits.get<float>(); }
  [[nodiscard]] cudaStream_t stream() const { return forward_.stream(); }

  /// Each step of a pass alone, into the timer.
  void profile(int images, StageTimer& timer) { forward_.enqueue(images, activations_, &timer); }
  /// Throws what a third party's plan() threw since the last call.
  void check_host_plans();
  void forget_host_plans() { (void)forward_.take_failure(); }

 private:
  const DeviceModel& model_;
  std::shared_ptr<kernels::cuda::GemmCache> cache_;
  Forward forward_;
  Activations activations_;
  std::map<int, Graph> graphs_;
};

}  // namespace pyra::engine
