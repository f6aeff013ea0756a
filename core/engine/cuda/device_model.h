// A model's weights on the device, in the types the kernels want, at the places where the forward pass needs them.
#pragma once
#include <optional>
#include <vector>

#include "engine/cuda/device_store.h"
#include "engine/engine.h"
#include "kernels/cuda/cuda_call.h"

namespace pyra::engine {

struct DeviceLinear {
  const void* weight = nullptr;  ///< [out,in] of the compute type
  const void* bias = nullptr;    ///< [out] of the type of the layer's result
  int in = 0, out = 0;
};

struct DeviceNorm {
  const float *weight = nullptr, *bias = nullptr;
};

/// What a block's merge is made of; see sdk/plan_recipe.h.
struct DeviceMerge {
  enum class Kind { bipartite, rank, by_host };
  Kind kind = Kind::bipartite;
  int kept = 0, merged = 0;
  int prune = 0;                       ///< rank
  const uint8_t* in_side_a = nullptr;  ///< bipartite: null for the alternating split
  bool weighted = true;
  const float *gate_a = nullptr, *gate_b = nullptr, *gate_weight = nullptr, *gate_bias = nullptr;
  float gate_eps = 0;
};

struct DeviceBlock {
  DeviceNorm norm1, norm2;
  DeviceLinear qkv, proj, fc1, fc2;
  int tokens = 0;  ///< entering
  std::optional<DeviceMerge> merge;
};

/// Types of the activations. The residual stream is what accuracy hangs on: see docs/benchmarks.md.
struct DeviceTypes {
  DType compute = DType::fp32, residual = DType::fp32;
  bool tf32 = false;  ///< of the linear layers' fp32 products; the head stays exact
  /// Of a channel that stands in the stream and in a norm's output.
  [[nodiscard]] double row_bytes() const {
    return double(kernels::cuda::size_of(compute) + kernels::cuda::size_of(residual));
  }
};
[[nodiscard]] DeviceTypes types_of(Precision precision);

/// Throws Error(usage) for shapes that the kernels do not do.
void check_shapes(const nn::VitConfig& config);
/// The recipe of a block's plan, if the merger gives one; Error(plugin) where it does not leave `kept` tokens or its
/// gate is not of this shape: kernels trust it.
[[nodiscard]] std::optional<sdk::PlanRecipe> checked_recipe(const nn::MergeSetup& setup, int block, int tokens,
                                                            int kept, const nn::VitConfig& config);
/// Without its gate, whose tensors may be elsewhere.
[[nodiscard]] DeviceMerge merge_of(const sdk::PlanRecipe& recipe, int tokens, int kept, int64_t protected_tokens,
                                   DeviceStore& store);

/// Uploads a model; everything it points to lives as long as it does. A PEFT method still attached is merged on the way
/// up, Error(usage) where it cannot be. Throws Error(usage) for a model whose head dimension the kernels do not do.
class DeviceModel {
 public:
  DeviceModel(const nn::Vit& model, DeviceTypes types);

  DeviceTypes types;
  nn::VitConfig config;
  DeviceLinear patch_embed;
  const float *prefix = nullptr, *positions = nullptr;  ///< [protected,C], [patches,C]
  std::vector<DeviceBlock> blocks;
  DeviceNorm norm;
  std::vector<DeviceLinear> heads;  ///< fp32; of two, each halved, so that their sum is the mean
  bool proportional_attention = true;
  [[nodiscard]] size_t bytes() const { return store_.bytes(); }

 private:
  DeviceLinear linear(const nn::TensorMap& weights, const std::string& name, DType result);
  DeviceNorm norm_of(const nn::TensorMap& weights, const std::string& name);
  void add_heads(const nn::TensorMap& weights);
  DeviceMerge planned_merge(const nn::MergeSetup& setup, int block, int tokens, int kept);

  DeviceStore store_;
};

}  // namespace pyra::engine
