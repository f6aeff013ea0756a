// A training step on the CPU: forward and backward by autograd over our kernels, AdamW.
#pragma once
#include "train/adamw.h"

namespace pyra::train {

class CpuTrainer final : public engine::Trainer {
 public:
  /// Puts `model` in training mode; model and images must outlive the trainer.
  CpuTrainer(nn::Vit& model, const engine::TrainingImages& images, const nn::Preprocess& preprocess,
             const engine::TrainerOptions& options);

  void step(const engine::TrainStep& step) override;
  [[nodiscard]] engine::StepSums collect() override;
  void publish() override {}
  void take_over() override;

 private:
  [[nodiscard]] at::Tensor images_of(const engine::TrainStep& step) const;

  nn::Vit& model_;
  engine::TrainingImages images_;
  nn::Preprocess preprocess_;
  engine::TrainerOptions options_;
  AdamW optimiser_;
  engine::StepSums sums_;
};

}  // namespace pyra::train
