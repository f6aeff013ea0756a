// DiffRate's search (arXiv 2305.17997): the logits of every block's rates train, the model does not.
//   loss = cross-entropy + weight ((MACs - target) / unit)²
// AdamW at a constant rate. What is random (the order of images) is a function of (seed, epoch), so a search restored
// from its snapshot goes on bit for bit (same number of threads; on a GPU same device and algorithms). On the CPU
// autograd goes through the model; on a GPU a pass of its own (engine/soft_pass.h) says what the loss is and what it
// asks of the survival probabilities, and autograd goes on from there.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "data/loader.h"
#include "engine/soft_pass.h"
#include "train/adamw.h"
#include "train/loop.h"
#include "train/rate_masks.h"

namespace pyra::train {

struct RateSearchSettings {
  double target = 0;  ///< multiply-adds of one image
  double weight = 5;  ///< of the distance to the target
  double unit = 1e9;  ///< of multiply-adds in the loss
  double lr = 0.01;
  int64_t epochs = 3;
  int64_t batch = 32;  ///< images a step; a set with fewer makes one batch of what there is
  uint64_t seed = 0;
  std::string device = "cpu";  ///< "cpu" or "cuda:INDEX": where the model's passes are computed; the rates are here
  engine::Precision precision = engine::Precision::fp32;  ///< of the model; on the CPU fp32 or bf16
  bool proportional_attention = true;                     ///< as the model that is to run with the counts
  KeptCounts start{};  ///< what the first rates keep; empty: every candidate is as likely as the others
};

class RateSearch {
 public:
  /// `model` merges nothing and has no tensor that trains; it and the images must outlive the search. Error(input) for
  /// an empty set, Error(usage) for a model of one block, which keeps all. On a GPU also engine::make_cuda_soft_pass's.
  RateSearch(const nn::Vit& model, const data::StoredSet& images, const nn::Preprocess& preprocess,
             const RateSearchSettings& settings);

  [[nodiscard]] bool finished() const { return position_.epoch >= settings_.epochs; }
  /// One optimiser step. Throws Diverged, before it changed anything, for a loss or gradient that is not finite.
  void step();

  [[nodiscard]] const Position& position() const { return position_; }
  [[nodiscard]] int64_t images_per_step() const;
  [[nodiscard]] int64_t steps_per_epoch() const;
  /// Of the last step: mean cross-entropy, and multiply-adds of the counts it ran with.
  [[nodiscard]] double last_cross_entropy() const { return last_cross_entropy_; }
  [[nodiscard]] int64_t last_macs() const { return last_macs_; }

  /// What the rates keep now.
  [[nodiscard]] KeptCounts counts() const;

  /// Logits and moments, sharing storage.
  [[nodiscard]] sdk::TensorMap state() const { return trained_state(optimiser_.tensors()); }
  /// Takes over a state saved by a search over the same model. Error(input); `where` opens the message.
  void restore(const Position& position, const sdk::TensorMap& state, const std::string& where);

 private:
  /// What a batch says under the rates: its mean cross-entropy, differentiable in them, and how many are right.
  struct Outcome {
    at::Tensor cross_entropy;
    int64_t correct = 0;
  };
  [[nodiscard]] Rates rates() const;
  [[nodiscard]] std::vector<int64_t> next_indices();
  [[nodiscard]] Outcome outcome_on_cpu(const std::vector<int64_t>& indices, const Rates& rates) const;
  [[nodiscard]] Outcome outcome_of_pass(const std::vector<int64_t>& indices, const Rates& rates);
  void advance(int64_t correct, int64_t images);

  const nn::Vit& model_;
  const data::StoredSet& images_;
  nn::Preprocess preprocess_;
  RateSearchSettings settings_;
  sdk::TensorMap logits_;  // "blocks.0.prune_logits" …
  AdamW optimiser_;
  std::unique_ptr<engine::SoftPass> pass_;  // null on the CPU
  Position position_;
  std::vector<int64_t> order_;  // of epoch order_epoch_
  int64_t order_epoch_ = -1;
  double last_cross_entropy_ = 0;
  int64_t last_macs_ = 0;
};

/// The rates that a map of logits ("blocks.0.prune_logits", "blocks.0.merge_logits" …) gives a model's blocks.
[[nodiscard]] Rates rates_of(const nn::VitConfig& config, const sdk::TensorMap& logits);

/// The loss above for logits [B,classes] of the model, differentiable in rates and logits.
[[nodiscard]] at::Tensor search_loss(const at::Tensor& cross_entropy, const at::Tensor& macs,
                                     const RateSearchSettings& settings);

/// A pass's cross-entropy, whose gradient in the rates' survival probabilities is the pass's.
[[nodiscard]] at::Tensor pass_cross_entropy(const engine::SoftPassResult& result, const Rates& rates,
                                            std::span<const kernels::SoftCounts> counts);

/// Logits with which a block keeps `count` tokens, at least protected + 2 (one patch alone would take a distribution
/// that is certain and cannot train): p_i rises or falls exponentially with the candidate, the least that a mean says
/// of a distribution. [patches], zeros for half of them.
[[nodiscard]] at::Tensor logits_for(int64_t count, int64_t patches, int64_t protected_tokens);

/// The counts scaled by one factor, block 0 excepted, so that their multiply-adds are the most that do not exceed
/// `target`. Empty when even one patch a block is too much.
[[nodiscard]] KeptCounts fit_counts(const nn::VitConfig& config, const KeptCounts& counts, int64_t target);

}  // namespace pyra::train
