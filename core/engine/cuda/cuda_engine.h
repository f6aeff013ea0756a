// The engine on a GPU: one captured graph per batch size over memory planned once, a large batch in two halves side by
// side, and a pipeline of two batches, so that the copy of one, the pass of another and what the caller does meanwhile
// overlap.
#pragma once
#include <array>
#include <deque>
#include <map>
#include <memory>

#include "engine/cuda/forward.h"

namespace pyra::engine {

class CudaEngine final : public Engine {
 public:
  CudaEngine(const nn::Vit& model, const nn::Preprocess& preprocess, const EngineOptions& options, int device);
  ~CudaEngine() override;

  [[nodiscard]] at::Tensor run(const at::Tensor& images) override;
  void submit(const at::Tensor& images) override;
  [[nodiscard]] at::Tensor collect() override;
  [[nodiscard]] int64_t in_flight() const override { return int64_t(slots_.size()); }
  [[nodiscard]] double last_seconds() const override { return last_seconds_; }
  [[nodiscard]] std::vector<double> time_ms(const at::Tensor& images, int64_t runs) override;
  [[nodiscard]] std::vector<Stage> profile(const at::Tensor& images) override;
  [[nodiscard]] int64_t device_bytes(int64_t batch) const override;

 private:
  /// The way of one batch: pinned memory, its place on the device, and when each may be used again.
  struct Slot {
    PinnedMemory host_images, host_logits;
    DeviceMemory device_images;
    cudaEvent_t copied = nullptr, begun = nullptr, read = nullptr, done = nullptr, returned = nullptr;
    int batch = 0;
  };
  /// A share of the batch with streams and memory of its own.
  struct Branch {
    std::unique_ptr<Forward> forward;
    Activations activations;
  };
  void check(const at::Tensor& images) const;
  /// Into how many branches a batch of that size is cut: shares of the same size, or an image's place would matter.
  [[nodiscard]] static int branches_of(int batch);
  void plan_for(int batch);
  cudaGraphExec_t graph_for(int batch);
  void enqueue(int batch);
  void check_host_plans();
  void drop_graphs();
  void stage(Slot& slot, const at::Tensor& images);
  void read_images(const Slot& slot, const at::Tensor& images);
  void return_logits(const Slot& slot);
  [[nodiscard]] cudaStream_t stream() const { return branches_[0].forward->stream(); }

  int device_;
  DeviceModel device_model_;
  std::shared_ptr<kernels::cuda::GemmCache> cache_;
  std::array<Branch, 2> branches_;
  cudaEvent_t fork_ = nullptr, join_ = nullptr;
  std::map<int, cudaGraphExec_t> graphs_;
  std::array<Slot, 2> slots_;
  std::deque<size_t> queue_;  ///< of slots, in the order of submission
  size_t next_ = 0;
  double last_seconds_ = 0;
  cudaStream_t copy_ = nullptr;
};

}  // namespace pyra::engine
