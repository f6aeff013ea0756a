// The contract of a PEFT plugin (parameter-efficient fine-tuning: LoRA, BitFit, adapters).
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "sdk/model_shape.h"
#include "sdk/tensor_decl.h"

namespace pyra::sdk {

enum class LinearKind { qkv, proj, fc1, fc2 };

/// One linear layer of a block.
struct LinearSite {
  int64_t block = 0;
  LinearKind kind = LinearKind::qkv;
  int64_t in = 0;   ///< input features
  int64_t out = 0;  ///< output features
  /// "blocks.3.attn.qkv", "blocks.3.attn.proj", "blocks.3.mlp.fc1", "blocks.3.mlp.fc2" (timm's names).
  [[nodiscard]] std::string name() const;
};

/// y += scale * (dropout(x) aᵀ) bᵀ, added by the core inside its linear kernel.
struct LowRank {
  at::Tensor a;  ///< [rank,in] fp32
  at::Tensor b;  ///< [out,rank] fp32
  double scale = 1.0;
  double dropout = 0.0;  ///< on x, in training only
};

/// What a method adds to a frozen layer when it is merged: W += weight, bias += bias. Undefined: nothing.
struct LinearDelta {
  at::Tensor weight;  ///< [out,in] fp32
  at::Tensor bias;    ///< [out] fp32
};

/// Names the few tensors that train and how they act on the frozen model. Const and without mutable state.
class PeftMethod {
 public:
  virtual ~PeftMethod();

  /// New tensors; none by default.
  [[nodiscard]] virtual std::vector<TensorDecl> declare(const ModelShape& shape) const;

  /// Whether the model's own tensor of this name trains in place ("blocks.0.norm1.bias"). No by default.
  /// The head always trains.
  [[nodiscard]] virtual bool trains(std::string_view parameter) const;

  /// The low-rank term of a layer, if that is all the method does there: the fast way.
  [[nodiscard]] virtual std::optional<LowRank> low_rank(const LinearSite& site, const TensorMap& learned) const;

  /// Whether adapt() changes this site. No by default.
  [[nodiscard]] virtual bool adapts(const LinearSite& site) const;

  /// The layer's new output, from its input x [rows,in] and output y [rows,out], by autograd operations:
  /// the general way (adapters, gates). Called only where adapts(site).
  [[nodiscard]] virtual at::Tensor adapt(const LinearSite& site, const at::Tensor& x, const at::Tensor& y,
                                         const TensorMap& learned) const;

  /// Whether everything the method does can be written into the frozen weights.
  [[nodiscard]] virtual bool mergeable() const = 0;

  /// What merging adds to a layer, in fp32; by default what low_rank() says: scale * b a.
  [[nodiscard]] virtual LinearDelta delta(const LinearSite& site, const TensorMap& learned) const;

  /// The method's part of PEFT's adapter_config.json, as a JSON object; "{}" by default. The core adds
  /// "peft_type": "<NAME>" where it is missing.
  [[nodiscard]] virtual std::string adapter_config(const ModelShape& shape) const;

 protected:
  PeftMethod() = default;
  PeftMethod(const PeftMethod&) = delete;
  PeftMethod& operator=(const PeftMethod&) = delete;
};

}  // namespace pyra::sdk
