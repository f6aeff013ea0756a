// Inference on the CPU: the batch is cut into tiles of whole images, one tile a thread, and a tile runs through
// the whole network while its activations stay in that core's cache. Results do not depend on the tiling.
#pragma once
#include <deque>

#include "engine/engine.h"

namespace pyra::engine {

class CpuEngine final : public Engine {
 public:
  /// Keeps a reference to `model`, which must outlive it and not change. compute: fp32 or bf16.
  CpuEngine(const nn::Vit& model, at::ScalarType compute, const nn::Preprocess& preprocess = {});

  /// An image's logits are bit-equal whatever the batch it stands in.
  [[nodiscard]] at::Tensor run(const at::Tensor& images) override;
  void submit(const at::Tensor& images) override;
  [[nodiscard]] at::Tensor collect() override;
  [[nodiscard]] int64_t in_flight() const override { return 1; }
  [[nodiscard]] double last_seconds() const override { return last_seconds_; }
  [[nodiscard]] std::vector<double> time_ms(const at::Tensor& images, int64_t runs, int64_t in_flight) override;
  [[nodiscard]] int64_t device_bytes(int64_t, int64_t) const override { return 0; }

 private:
  const nn::Vit& model_;
  at::ScalarType compute_;
  nn::Preprocess preprocess_;
  std::deque<std::pair<at::Tensor, double>> done_;  ///< logits, seconds
  double last_seconds_ = 0;
};

}  // namespace pyra::engine
