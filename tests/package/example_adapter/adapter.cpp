// A PEFT plugin of one's own: bottleneck adapters (Houlsby et al., arXiv 1902.00751) after the MLP of every block,
//   y += gelu(y downᵀ + b_down) upᵀ + b_up,
// with `up` zero at the start. The GELU stands between the two matrices, so no weight can take the adapter in: it is
// not mergeable, and merge-lora says so.
#include <ATen/ATen.h>

#include "base/text.h"
#include "sdk/plugin.h"

namespace {

using namespace pyra::sdk;

std::string tensor_name(int64_t block, std::string_view tensor) {
  return pyra::cat("blocks.", block, ".mlp.fc2.adapter.", tensor);
}

class Adapter final : public PeftMethod {
 public:
  static std::vector<Parameter> parameters() {
    return {{.name = "width",
             .default_value = int64_t{16},
             .help = "features between the two matrices",
             .minimum = 1,
             .maximum = 4096}};
  }

  explicit Adapter(const Parameters& parameters) : width_(parameters.integer("width")) {}

  [[nodiscard]] std::vector<TensorDecl> declare(const ModelShape& shape) const override {
    std::vector<TensorDecl> tensors;
    const int64_t channels = shape.embed_dim;
    for (int64_t block = 0; block < shape.depth; ++block) {
      tensors.push_back({.name = tensor_name(block, "down.weight"),
                         .shape = {width_, channels},
                         .init = Init::kaiming_uniform,
                         .fan_in = channels});
      tensors.push_back({.name = tensor_name(block, "down.bias"), .shape = {width_}});
      tensors.push_back({.name = tensor_name(block, "up.weight"), .shape = {channels, width_}});
      tensors.push_back({.name = tensor_name(block, "up.bias"), .shape = {channels}});
    }
    return tensors;
  }

  [[nodiscard]] bool adapts(const LinearSite& site) const override { return site.kind == LinearKind::fc2; }

  [[nodiscard]] at::Tensor adapt(const LinearSite& site, const at::Tensor&, const at::Tensor& y,
                                 const TensorMap& learned) const override {
    const auto tensor = [&](std::string_view name) { return learned.at(tensor_name(site.block, name)).to(y.dtype()); };
    const at::Tensor hidden = at::gelu(at::linear(y, tensor("down.weight"), tensor("down.bias")));
    return y + at::linear(hidden, tensor("up.weight"), tensor("up.bias"));
  }

  [[nodiscard]] bool mergeable() const override { return false; }

 private:
  int64_t width_;
};

}  // namespace

PYRA_PEFT_PLUGIN(Adapter, "adapter", "1.0", "Bottleneck adapters after every MLP (Houlsby et al., arXiv 1902.00751)")
