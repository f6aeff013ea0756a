// One vision transformer, training and inference, and the only caller of a merger.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/linear.h"
#include "nn/config.h"
#include "sdk/peft_method.h"
#include "sdk/tensor_decl.h"
#include "sdk/token_merger.h"

namespace pyra::nn {

using sdk::TensorMap;

/// A merger at work in a model: what `compress` and `finetune --set merge.name=` attach.
struct MergeSetup {
  std::string name;  ///< plugin name: "pyra"
  std::shared_ptr<const sdk::TokenMerger> merger;
  sdk::Schedule schedule;  ///< resolved
  TensorMap learned;       ///< the merger's tensors by declared name; fp32 masters
  bool proportional_attention = true;
};

/// A PEFT method at work in a model.
struct PeftSetup {
  std::string name;
  std::shared_ptr<const sdk::PeftMethod> method;
  TensorMap learned;
};

class SoftReduction;

/// Seeds of everything random in a training step; unused in inference.
struct StepRandom {
  uint64_t seed = 0;
  uint64_t step = 0;
};

struct ForwardOptions {
  bool training = false;
  at::ScalarType compute = at::kFloat;  ///< fp32 or bf16; residual stream, norms, softmax and sizes stay fp32
  double drop_path = 0.0;               ///< of the last block; rises linearly from 0
  StepRandom random{};
  /// Called after every block with its number, tokens [B,N',C] and sizes [B,N']; for tests and visualisation.
  std::function<void(int64_t, const at::Tensor&, const at::Tensor&)> trace{};
  /// Takes the place of attention and merger (nn/soft_reduction.h); the model must then carry no merger.
  SoftReduction* soft = nullptr;
};

class Vit {
 public:
  /// `weights` by timm's names, fp32, shapes as tensor_shapes(config); throws Error(input) naming the first
  /// tensor that is missing, unexpected or of another shape.
  Vit(VitConfig config, TensorMap weights);
  ~Vit();
  Vit(Vit&&) noexcept;
  Vit& operator=(Vit&&) noexcept;

  [[nodiscard]] const VitConfig& config() const { return config_; }
  /// The model's own tensors, by timm's names: fp32 masters, shared storage, not copies.
  [[nodiscard]] const TensorMap& weights() const { return weights_; }
  [[nodiscard]] const MergeSetup* merge() const { return merge_.get(); }
  [[nodiscard]] const PeftSetup* peft() const { return peft_.get(); }
  /// Tokens leaving each block; empty without a merger.
  [[nodiscard]] const std::vector<int64_t>& tokens_after() const { return tokens_after_; }

  /// Attach or (nullptr) detach; shapes of learned tensors are checked against the plugin's declarations.
  void set_merge(std::unique_ptr<MergeSetup> merge);
  void set_peft(std::unique_ptr<PeftSetup> peft);

  /// Sets requires_grad on the tensors named trainable: the PEFT method's and the merger's learned ones, the
  /// model's own that the method trains, and the head. Returns them by full name ("head.weight",
  /// "peft.lora.blocks.0.attn.qkv.lora_A.weight", "merge.pyra.blocks.0.a").
  [[nodiscard]] TensorMap train_mode();
  void eval_mode();

  /// Call after masters were changed in place (optimiser step, load): drops packed copies of trained weights.
  void weights_changed();

  /// images [B,3,S,S] fp32, normalised -> logits [B,num_classes] fp32.
  /// A merge plan that breaks its contract throws Error(plugin) naming plugin, block and index.
  [[nodiscard]] at::Tensor forward(const at::Tensor& images, const ForwardOptions& options = {}) const;

 private:
  struct Parts;
  struct Pass;
  void rebuild();
  VitConfig config_;
  TensorMap weights_;
  std::unique_ptr<MergeSetup> merge_;
  std::unique_ptr<PeftSetup> peft_;
  std::vector<int64_t> tokens_after_;  // of the attached merger, depth long
  std::unique_ptr<Parts> parts_;
};

/// Random weights in the manner of timm's (normal 0.02, biases 0, norms 1), by seed: for --arch.
[[nodiscard]] TensorMap random_weights(const VitConfig& config, uint64_t seed);

/// A tensor as declared, initialised by (seed, name): independent of the order of creation.
[[nodiscard]] at::Tensor make_tensor(const sdk::TensorDecl& decl, uint64_t seed);

/// W += delta for every site, in fp32, into new tensors; the model's other tensors are shared. Throws
/// Error(usage) naming the method when it is not mergeable.
[[nodiscard]] TensorMap merged_weights(const Vit& model);

}  // namespace pyra::nn
