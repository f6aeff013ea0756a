// Who computes the heavy part of a step of DiffRate's search: the frozen model's forward pass with every token kept and
// masks in place of reduction, its loss, and back to the masks. The search (train/rate_search.h) has the rates and
// their mathematics; on the CPU autograd goes through the model, on a GPU this does.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "engine/engine.h"
#include "kernels/soft_counts.h"

namespace pyra::engine {

struct SoftPassOptions {
  std::string device;  ///< "cuda:INDEX"
  Precision precision = Precision::fp32;
  int64_t batch = 32;  ///< images of every pass
  bool proportional_attention = true;
  bool deterministic = false;  ///< as EngineOptions::deterministic
};

struct SoftBatch {
  at::Tensor images;  ///< [B,S,S,3] uint8, or [B,3,S,S] fp32, normalised
  at::Tensor labels;  ///< [B] int64
};

struct SoftPassResult {
  double cross_entropy = 0;  ///< mean over images
  int64_t correct = 0;
  /// [depth,N] fp32 on the CPU: the gradient of the mean cross-entropy in the survival probabilities of a block's
  /// ranks, of pruning and of merging; 0 where they mask nothing.
  at::Tensor d_prune, d_merge;
};

class SoftPass {
 public:
  virtual ~SoftPass();
  SoftPass(const SoftPass&) = delete;
  SoftPass& operator=(const SoftPass&) = delete;

  /// `counts`: of every block, each beginning with what the one before it kept. Bit-equal from run to run (same device,
  /// same algorithms in the cache). Error(internal) for a batch of another size or counts that do not fit.
  [[nodiscard]] virtual SoftPassResult run(const SoftBatch& batch, std::span<const kernels::SoftCounts> counts) = 0;
  /// Bytes in use on the device.
  [[nodiscard]] virtual int64_t device_bytes() const = 0;

 protected:
  SoftPass() = default;
};

/// On a GPU (Error(device) where it is not there or too small). `model` merges nothing; it is copied. Error(usage) for
/// a model or precision that only the CPU searches with.
[[nodiscard]] std::unique_ptr<SoftPass> make_cuda_soft_pass(const nn::Vit& model, const nn::Preprocess& preprocess,
                                                            const SoftPassOptions& options);

}  // namespace pyra::engine
