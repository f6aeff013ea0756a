// Initial values: each a function of seed and name, so neither order nor number of threads matters.
#include <cmath>

#include "base/error.h"
#include "base/philox.h"
#include "nn/vit.h"

namespace pyra::nn {
namespace {

/// FNV-1a: names are short and few, and the value has to be the same on every machine.
uint64_t name_domain(std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : name) hash = (hash ^ uint8_t(c)) * 0x100000001b3;
  // Philox keeps the stream in the top byte of its domain.
  return hash & 0x00ffffffffffffff;
}

template <class Value>
at::Tensor filled(const std::vector<int64_t>& shape, Value&& value) {
  at::Tensor tensor = at::empty(shape, at::kFloat);
  float* data = tensor.data_ptr<float>();
  at::parallel_for(0, tensor.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) data[i] = value(uint64_t(i));
  });
  return tensor;
}

}  // namespace

at::Tensor make_tensor(const sdk::TensorDecl& decl, uint64_t seed) {
  const Philox random(seed, RandomStream::init, name_domain(decl.name));
  switch (decl.init) {
    case sdk::Init::zeros:
      return at::zeros(decl.shape, at::kFloat);
    case sdk::Init::ones:
      return at::ones(decl.shape, at::kFloat);
    case sdk::Init::kaiming_uniform: {
      const auto bound = float(1.0 / std::sqrt(double(std::max<int64_t>(1, decl.fan_in))));
      return filled(decl.shape, [&](uint64_t i) { return (2 * random.uniform(i) - 1) * bound; });
    }
    case sdk::Init::gaussian:
      return filled(decl.shape, [&](uint64_t i) { return random.normal(i) * float(decl.scale); });
  }
  fail(ExitCode::internal, "tensor ", decl.name, " is declared with an unknown initial value");
}

TensorMap random_weights(const VitConfig& config, uint64_t seed) {
  TensorMap weights;
  for (const TensorShape& tensor : tensor_shapes(config)) {
    const bool norm = tensor.name.find("norm") != std::string::npos;
    sdk::TensorDecl decl{.name = tensor.name, .shape = tensor.shape, .init = sdk::Init::gaussian, .scale = 0.02};
    if (tensor.name.ends_with(".bias")) decl.init = sdk::Init::zeros;
    if (norm && tensor.name.ends_with(".weight")) decl.init = sdk::Init::ones;
    weights.emplace(tensor.name, make_tensor(decl, seed));
  }
  return weights;
}

}  // namespace pyra::nn
