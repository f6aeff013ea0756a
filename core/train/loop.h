// The training loop, one step at a time: batches in a seeded order, each handed to whoever computes the step (on the
// CPU autograd, on a GPU a captured graph; engine/trainer.h).
//
// Everything random is a function of (seed, step), so a loop that is restored from its snapshot goes on bit for bit
// as if it had never stopped (same number of threads).
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "data/loader.h"
#include "engine/trainer.h"
#include "train/schedule.h"

namespace pyra::train {

struct LoopSettings {
  Schedule schedule{};
  double merge_lr = 0;     ///< peak of the merge group, under the same warm-up and cosine; 0: schedule.peak
  double max_seconds = 0;  ///< of training time; 0: none. Such a run depends on the machine's speed: it cannot be
                           ///< repeated step for step
  engine::AdamWSettings adamw{};
  int64_t batch = 32;  ///< images a step; a set with fewer makes one batch of what there is
  double drop_path = 0.1;
  data::Augment augment{};
  uint64_t seed = 0;
  std::string device = "cpu";  ///< "cpu" or "cuda:INDEX"
  engine::Precision precision = engine::Precision::fp32;
  bool deterministic = false;  ///< engine::TrainerOptions's
  engine::Distillation distillation{};
  /// A teacher's logits for a step's images (of TrainStep::indices, or TrainStep::images where those are there).
  std::function<at::Tensor(const engine::TrainStep&)> teacher{};
};

/// Where a run stands: with the tensors, all it needs to go on.
struct Position {
  int64_t step = 0;    ///< optimiser steps done
  int64_t epoch = 0;   ///< epoch of the next step
  int64_t batch = 0;   ///< the next batch within it
  double seconds = 0;  ///< training time so far: steps only, no decoding, no evaluation
  // Sums over the epoch so far.
  double loss_sum = 0;
  int64_t correct = 0, images = 0;
  double epoch_seconds = 0;
  bool operator==(const Position&) const = default;
};

/// What a finished epoch was like, or a part of one that the time limit ended.
struct EpochReport {
  int64_t step = 0;   ///< steps done since the start
  int64_t epoch = 0;  ///< counted from 0
  double loss = 0;    ///< mean over images
  double lr = 0, merge_lr = 0;
  double gradient_norm = 0;  ///< of the last step
  double accuracy = 0;       ///< on the training batches, as they were seen
  double images_per_second = 0;
  double seconds = 0;  ///< training time since the start
};

/// Training that went wrong for good: a loss, gradient or weight that is not finite. Exit code 7.
class Diverged : public Error {
 public:
  explicit Diverged(const std::string& text) : Error(ExitCode::untrusted, text) {}
  ~Diverged() override;
};

class Loop {
 public:
  /// Puts `model` in training mode; model and images must outlive the loop. Error(input) for an empty set; what
  /// engine::make_cuda_trainer throws.
  Loop(nn::Vit& model, const data::StoredSet& images, const nn::Preprocess& preprocess, const LoopSettings& settings);

  [[nodiscard]] bool finished() const;
  /// One optimiser step; the report when it ended an epoch or the run. Throws Diverged naming step and learning
  /// rate, before anything was changed by what is not finite. On a GPU the step may be still to come, and what went
  /// wrong in it is known kStepsAhead steps later or at the end of the epoch; with `waits` the step is done, as before
  /// a settle(), whose time is not training's.
  std::optional<EpochReport> step(bool waits = false);

  /// Waits for the steps begun. Throws Diverged as step() does.
  void wait();
  /// wait(), and brings the trained tensors to the model. Throws Diverged when one is not finite:
  /// called before anything is saved or evaluated.
  void settle();

  [[nodiscard]] const Position& position() const { return position_; }
  [[nodiscard]] double last_loss() const { return last_loss_; }
  [[nodiscard]] double last_lr() const { return last_lr_; }
  [[nodiscard]] int64_t steps_per_epoch() const { return steps_per_epoch_; }
  [[nodiscard]] int64_t images_per_step() const;
  [[nodiscard]] const std::vector<engine::TrainedTensor>& trained() const { return trainer_->tensors(); }
  [[nodiscard]] int64_t device_bytes() const { return trainer_->device_bytes(); }
  [[nodiscard]] int64_t set_bytes() const { return trainer_->set_bytes(); }

  /// Trained tensors and moments as of the last settle(), sharing storage: "value.<name>", "first.<name>",
  /// "second.<name>".
  [[nodiscard]] sdk::TensorMap state() const;
  /// Takes over a state saved by a loop over the same model. Error(input) naming the tensor that is missing or of
  /// another shape; `where` opens the message.
  void restore(const Position& position, const sdk::TensorMap& state, const std::string& where);

 private:
  [[nodiscard]] double rate(double peak) const;
  [[nodiscard]] engine::TrainStep next_step();
  [[nodiscard]] EpochReport report() const;
  void advance();

  nn::Vit& model_;
  const data::StoredSet& images_;
  nn::Preprocess preprocess_;
  LoopSettings settings_;
  std::unique_ptr<engine::Trainer> trainer_;
  int64_t steps_per_epoch_ = 1;
  Position position_;
  int64_t steps_ahead_ = 0;     // begun and not collected
  std::vector<int64_t> order_;  // of epoch order_epoch_
  int64_t order_epoch_ = -1;
  double last_loss_ = 0, last_lr_ = 0, last_merge_lr_ = 0, last_norm_ = 0;
};

}  // namespace pyra::train
