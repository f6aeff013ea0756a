// Inference on the CPU: the batch is cut into tiles of whole images, one tile a thread, and a tile runs through
// the whole network while its activations stay in that core's cache. Results do not depend on the tiling.
#pragma once
#include <ATen/core/Tensor.h>

#include "nn/vit.h"

namespace pyra::engine {

class CpuEngine {
 public:
  /// Keeps a reference to `model`, which must outlive it and not change. compute: fp32 or bf16.
  CpuEngine(const nn::Vit& model, at::ScalarType compute);

  /// images [B,3,S,S] fp32, normalised -> logits [B,num_classes] fp32. Thread-safe. An image's logits are
  /// bit-equal whatever the batch it stands in.
  [[nodiscard]] at::Tensor run(const at::Tensor& images) const;

 private:
  const nn::Vit& model_;
  at::ScalarType compute_;
};

}  // namespace pyra::engine
