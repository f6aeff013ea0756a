#include "engine/cuda/lane.h"

#include "kernels/cuda/cuda_call.h"
#include "kernels/cuda/gemm_cache.h"

namespace pyra::engine {

Lane::Lane(const nn::Vit& model, const DeviceModel& device_model, const nn::Preprocess& preprocess, bool exact_gelu,
           std::shared_ptr<kernels::cuda::GemmCache> cache)
    : model_(device_model), cache_(std::move(cache)), forward_(model, device_model, preprocess, exact_gelu, cache_) {}

Lane::~Lane() {
  for (const auto& [images, graph] : graphs_) (void)cudaGraphExecDestroy(graph);
}

void Lane::clear() {
  PYRA_CUDA(cudaStreamSynchronize(stream()));
  for (const auto& [images, graph] : graphs_) (void)cudaGraphExecDestroy(graph);
  graphs_.clear();
  activations_ = {};
}

void Lane::make_room(int images) {
  if (room() >= images) return;
  clear();
  activations_ = Activations(model_, images);
}

void Lane::capture(int images) {
  // Once without a graph: matrix products choose their algorithms, kernels set their attributes.
  forward_.enqueue(images, activations_);
  PYRA_CUDA(cudaStreamSynchronize(stream()));
  check_host_plans();
  if (cache_) cache_->save();

  cudaGraph_t graph = nullptr;
  PYRA_CUDA(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal));
  try {
    forward_.enqueue(images, activations_);
  } catch (...) {
    (void)cudaStreamEndCapture(stream(), &graph);
    if (graph) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError();
    throw;
  }
  PYRA_CUDA(cudaStreamEndCapture(stream(), &graph));
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  (void)cudaGraphDestroy(graph);
  PYRA_CUDA(status);
  graphs_.emplace(images, executable);
  PYRA_CUDA(cudaGraphUpload(executable, stream()));
}

void Lane::read_images(const DeviceImages& source, int images) {
  forward_.read_images(source, images, activations_);
}

void Lane::launch(int images) {
  PYRA_CUDA(cudaGraphLaunch(graphs_.at(images), stream()));
}

}  // namespace pyra::engine
