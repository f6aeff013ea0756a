#include "engine/cuda/lane.h"

#include "kernels/cuda/cuda_call.h"
#include "kernels/cuda/gemm_cache.h"

namespace pyra::engine {

Lane::Lane(const nn::Vit& model, const DeviceModel& device_model, const nn::Preprocess& preprocess, bool exact_gelu,
           std::shared_ptr<kernels::cuda::GemmCache> cache)
    : model_(device_model), cache_(std::move(cache)), forward_(model, device_model, preprocess, exact_gelu, cache_) {}

void Lane::clear() {
  PYRA_CUDA(cudaStreamSynchronize(stream()));
  graphs_.clear();
  activations_ = {};
}

void Lane::make_room(int images) {
  if (room() >= images) return;
  clear();
  activations_ = Activations(model_, images);
}

void Lane::capture(int images, bool beside) {
  // Once without a graph: matrix products choose their algorithms, kernels set their attributes.
  forward_.enqueue(images, activations_, beside);
  PYRA_CUDA(cudaStreamSynchronize(stream()));
  check_host_plans();
  if (cache_) cache_->save();
  graphs_.emplace(key(images, beside), Graph(stream(), [&] { forward_.enqueue(images, activations_, beside); }));
}

void Lane::read_images(const DeviceImages& source, int images) {
  forward_.read_images(source, images, activations_);
}

void Lane::check_host_plans() {
  if (const std::exception_ptr failure = forward_.take_failure()) std::rethrow_exception(failure);
}

void Lane::launch(int images, bool beside) {
  graphs_.at(key(images, beside)).launch(stream());
}

}  // namespace pyra::engine
