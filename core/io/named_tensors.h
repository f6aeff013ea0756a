// Tensors by name wherever they come from: all that a model is described by and read from.
#pragma once
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "io/safetensors.h"

namespace pyra::io {

struct NamedTensors {
  std::string where;  ///< the file, as messages name it
  Metadata metadata;
  std::map<std::string, std::vector<int64_t>, std::less<>> shapes;
  /// A tensor of `shapes` as fp32; Error(input) for one of integers.
  std::function<at::Tensor(const std::string& name)> fp32;
};

/// A file's, read when they are asked for; keeps a reference to `file`.
[[nodiscard]] NamedTensors named_tensors(const SafetensorsFile& file);
/// Tensors that are there already.
[[nodiscard]] NamedTensors named_tensors(std::string where, sdk::TensorMap tensors, Metadata metadata);

}  // namespace pyra::io
