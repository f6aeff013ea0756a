// Tensors a plugin asks the core to create, train, save and restore on its behalf.
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

namespace pyra::sdk {

enum class Init {
  zeros,
  ones,
  kaiming_uniform,  ///< uniform in [-1/sqrt(fan_in), 1/sqrt(fan_in)]: PyTorch's kaiming_uniform_(a = sqrt 5)
  gaussian,         ///< normal with standard deviation `scale`
};

/// One trained tensor, fp32. The core prefixes the name with the plugin's, so names of two plugins never meet.
struct TensorDecl {
  std::string name;  ///< as it should be written to files: "blocks.3.attn.qkv.lora_A.weight"
  std::vector<int64_t> shape;
  Init init = Init::zeros;
  double scale = 1.0;  ///< gaussian: standard deviation
  int64_t fan_in = 1;  ///< kaiming_uniform
};

/// Tensors by their declared names.
using TensorMap = std::map<std::string, at::Tensor, std::less<>>;

}  // namespace pyra::sdk
