// Who computes a training step: forward, loss, backward, optimiser. The loop (train/loop.h) says which images, at which
// rates; on the CPU autograd does it, on a GPU one captured graph a step.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace pyra::engine {

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with PyTorch's order of operations).
struct AdamWSettings {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 1e-4;  ///< decoupled, on every tensor
};

/// A tensor that trains and its two moments, on the CPU, all of one shape, fp32, contiguous.
struct TrainedTensor {
  std::string name;  ///< full name: "head.weight", "merge.pyra.blocks.0.a"
  at::Tensor value;  ///< shares the model's storage
  at::Tensor first, second;
  bool merge_group = false;  ///< takes the merger's learning rate
};

/// `tensors` as nn::Vit::train_mode() returns them, moments zero, in the order of names; those that begin with "merge."
/// are the merge group. Error(internal) for a tensor that is not contiguous fp32.
[[nodiscard]] std::vector<TrainedTensor> trained_tensors(const nn::TensorMap& tensors);

/// How much a teacher's logits count, where a step has them: loss = (1 - weight) cross-entropy + weight T² KL(teacher,
/// student), both softened by the temperature T (Hinton et al., arXiv 1503.02531).
struct Distillation {
  double weight = 0.5, temperature = 2;
};

struct TrainerOptions {
  std::string device = "cpu";  ///< "cpu" or "cuda:INDEX"
  Precision precision = Precision::fp32;
  AdamWSettings adamw{};
  double drop_path = 0;  ///< of the last block; rises linearly from 0
  uint64_t seed = 0;
  int64_t batch = 32;          ///< images of every step
  bool deterministic = false;  ///< as EngineOptions::deterministic
  Distillation distillation{};
};

/// What a step is given.
struct TrainStep {
  uint64_t number = 0;           ///< from 0: what is random in the step, and Adam's bias correction, follow from it
  double lr = 0, merge_lr = 0;   ///< of the merge group
  std::vector<int64_t> indices;  ///< into the set of images, `batch` of them
  at::Tensor images;             ///< [B,3,S,S] fp32, normalised, where the loop made them itself (augmentation)
  at::Tensor teacher;            ///< [B,classes] fp32: a teacher's logits for these images, or undefined
};

/// What became of the steps since the last collect().
struct StepSums {
  double loss_sum = 0;  ///< over images
  int64_t correct = 0, images = 0;
  double last_loss = 0, last_norm = 0;  ///< of the last step: mean loss; Euclidean norm over all gradients
  /// The first step whose loss or gradient was not finite, or -1. It changed nothing, and neither did any after it.
  int64_t bad_step = -1;
  double bad_loss = 0, bad_norm = 0;
};

class Trainer {
 public:
  virtual ~Trainer();
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  /// May return before the step is done.
  virtual void step(const TrainStep& step) = 0;
  /// Waits for what was begun.
  [[nodiscard]] virtual StepSums collect() = 0;

  /// Brings values and moments to the CPU tensors, or takes them from there.
  virtual void publish() = 0;
  virtual void take_over() = 0;
  [[nodiscard]] const std::vector<TrainedTensor>& tensors() const { return tensors_; }

  /// The most bytes that were in use on the device; 0 on the CPU.
  [[nodiscard]] virtual int64_t device_bytes() const { return 0; }
  /// What of these the set of images takes, where it lives on the device.
  [[nodiscard]] virtual int64_t set_bytes() const { return 0; }

 protected:
  explicit Trainer(std::vector<TrainedTensor> tensors) : tensors_(std::move(tensors)) {}
  std::vector<TrainedTensor> tensors_;
};

/// The images that steps choose from.
struct TrainingImages {
  int64_t size = 0;   ///< of each: [size,size,3] uint8
  at::Tensor labels;  ///< [n] int64
  /// Copies images of these indices one after another; outlives the trainer.
  std::function<void(std::span<const int64_t> indices, uint8_t* to)> read;

  [[nodiscard]] int64_t count() const { return labels.size(0); }
  [[nodiscard]] int64_t image_bytes() const { return size * size * 3; }
};

/// On a GPU (Error(device) where it is not there or too small). `model` is in training mode and outlives the trainer;
/// Error(usage) naming the tensor or the merger that only the CPU trains.
[[nodiscard]] std::unique_ptr<Trainer> make_cuda_trainer(nn::Vit& model, const TrainingImages& images,
                                                         const nn::Preprocess& preprocess,
                                                         const TrainerOptions& options);

}  // namespace pyra::engine
