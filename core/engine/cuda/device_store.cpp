#include "engine/cuda/device_store.h"

#include <ATen/Functions.h>

namespace pyra::engine {

at::ScalarType scalar_type(DType dtype) {
  return dtype == DType::fp32 ? at::kFloat : dtype == DType::bf16 ? at::kBFloat16 : at::kHalf;
}

void* DeviceStore::keep(const at::Tensor& host) {
  DeviceMemory memory(host.nbytes());
  PYRA_CUDA(cudaMemcpy(memory.get(), host.const_data_ptr(), host.nbytes(), cudaMemcpyHostToDevice));
  bytes_ += memory.bytes();
  memory_.push_back(std::move(memory));
  return memory_.back().get();
}

void* DeviceStore::upload(const at::Tensor& tensor, DType dtype) {
  return keep(tensor.detach().to(scalar_type(dtype)).contiguous());
}

const uint8_t* DeviceStore::upload_side_a(const sdk::Partition& partition, int tokens, int64_t protected_tokens) {
  const std::vector<int64_t> side = sdk::side_a(partition, tokens, protected_tokens);
  if (side.empty()) return nullptr;
  at::Tensor flags = at::zeros({tokens}, at::kByte);
  for (const int64_t token : side) flags[token] = 1;
  return static_cast<const uint8_t*>(keep(flags));
}

}  // namespace pyra::engine
