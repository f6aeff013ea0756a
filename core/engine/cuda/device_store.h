// Tensors of the host on the device, kept as long as the store lives.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "engine/cuda/device_memory.h"
#include "sdk/plan_recipe.h"

namespace pyra::engine {

using kernels::cuda::DType;

[[nodiscard]] at::ScalarType scalar_type(DType dtype);

class DeviceStore {
 public:
  /// Dense, in the type asked for.
  void* upload(const at::Tensor& tensor, DType dtype);
  const float* upload(const at::Tensor& tensor) { return static_cast<const float*>(upload(tensor, DType::fp32)); }
  /// [tokens] bytes, 1 for a token of side A; null for the alternating split.
  const uint8_t* upload_side_a(const sdk::Partition& partition, int tokens, int64_t protected_tokens);
  [[nodiscard]] size_t bytes() const { return bytes_; }

 private:
  void* keep(const at::Tensor& host);
  std::vector<DeviceMemory> memory_;
  size_t bytes_ = 0;
};

}  // namespace pyra::engine
