// The engine on a GPU: memory planned once, captured graphs, and a pipeline of batches in flight, so that the copy of
// one, the passes of others and what the caller does meanwhile overlap. Passes too short to fill the GPU go side by
// side, each along a lane (lane.h) of its own; a pass begins when the one before the last is done, and one that goes
// alone when the last is done too.
#pragma once
#include <array>
#include <memory>

#include "engine/cuda/lane.h"

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
  [[nodiscard]] std::vector<double> time_ms(const at::Tensor& images, int64_t runs, int64_t in_flight) override;
  [[nodiscard]] std::vector<Stage> profile(const at::Tensor& images) override;
  [[nodiscard]] int64_t device_bytes(int64_t batch, int64_t in_flight) const override;

 private:
  /// Two batches computed and one on its way to the device.
  static constexpr size_t kInFlight = 3;
  /// The way of one batch: pinned memory, its place on the device, its lane. Free again once its logits are collected.
  struct Slot {
    PinnedMemory host_images, host_logits;
    DeviceMemory device_images;
    cudaEvent_t copied = nullptr, returned = nullptr;
    int batch = 0;
    size_t lane = 0;
  };
  /// When a batch was computed.
  struct Pass {
    cudaEvent_t begun = nullptr, done = nullptr;
  };

  void check(const at::Tensor& images) const;
  void check_idle(const char* call) const;  ///< nothing is in flight
  [[nodiscard]] size_t lanes_taken(int64_t batch, int64_t in_flight) const;
  [[nodiscard]] bool has_company(int batch);
  [[nodiscard]] bool fits(const Lane& lane, int batch, size_t leaves) const;
  [[nodiscard]] size_t choose_lane(int batch, bool beside);
  void prepare(Lane& lane, int batch, bool beside);
  void stage(Slot& slot, const at::Tensor& images);
  void launch(const at::Tensor& images);
  void await_turn(size_t lane, bool beside);
  void read_images(const Slot& slot, const at::Tensor& images);
  void wait_for_lanes();
  void abandon() noexcept;
  [[nodiscard]] double seconds_of(const Pass& pass, const Pass& before) const;
  [[nodiscard]] Slot& slot(int64_t number) { return slots_[size_t(number) % slots_.size()]; }
  [[nodiscard]] Pass& pass(int64_t number) { return passes_[size_t(number) % passes_.size()]; }

  int device_;
  DeviceModel device_model_;
  std::shared_ptr<kernels::cuda::GemmCache> cache_;
  int most_beside_;  ///< images of a pass that leaves room for another
  std::array<std::unique_ptr<Lane>, 2> lanes_;
  std::array<Slot, kInFlight> slots_;
  std::array<Pass, kInFlight + 1> passes_;  ///< one more than are in flight: each is timed from the end of the last
  int64_t submitted_ = 0, collected_ = 0;   ///< batches since the beginning
  double last_seconds_ = 0;
  cudaStream_t copy_ = nullptr;
};

}  // namespace pyra::engine
