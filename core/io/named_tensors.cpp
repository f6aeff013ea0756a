#include "io/named_tensors.h"

#include <memory>

namespace pyra::io {

NamedTensors named_tensors(const SafetensorsFile& file) {
  NamedTensors named{.where = file.path().string(), .metadata = file.metadata(), .shapes = {}, .fp32 = {}};
  for (const auto& [name, entry] : file.entries()) named.shapes.emplace(name, entry.shape);
  named.fp32 = [&file](const std::string& name) { return read_fp32(file, name); };
  return named;
}

NamedTensors named_tensors(std::string where, sdk::TensorMap tensors, Metadata metadata) {
  NamedTensors named{.where = std::move(where), .metadata = std::move(metadata), .shapes = {}, .fp32 = {}};
  for (const auto& [name, tensor] : tensors) named.shapes.emplace(name, tensor.sizes().vec());
  const auto shared = std::make_shared<const sdk::TensorMap>(std::move(tensors));
  named.fp32 = [shared](const std::string& name) { return shared->find(name)->second.to(at::kFloat).contiguous(); };
  return named;
}

}  // namespace pyra::io
