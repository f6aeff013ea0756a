#include "train/cpu_trainer.h"

#include <ATen/Functions.h>

#include <cmath>

#include "base/error.h"

namespace pyra::train {
namespace {

at::ScalarType compute_type(engine::Precision precision) {
  if (precision == engine::Precision::fp32) return at::kFloat;
  if (precision == engine::Precision::bf16) return at::kBFloat16;
  fail(ExitCode::usage, "dtype ", engine::precision_name(precision), ": the CPU trains in fp32 or bf16");
}

at::Tensor loss_of(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& teacher,
                   const engine::Distillation& distillation) {
  if (!teacher.defined()) return at::cross_entropy_loss(logits, labels);
  const double t = distillation.temperature, weight = distillation.weight;
  const at::Tensor divergence =
      at::kl_div((logits / t).log_softmax(1), (teacher / t).log_softmax(1), at::Reduction::Sum, /*log_target=*/true) *
      (t * t / double(logits.size(0)));
  if (weight == 1) return divergence;
  return (1 - weight) * at::cross_entropy_loss(logits, labels) + weight * divergence;
}

}  // namespace

CpuTrainer::CpuTrainer(nn::Vit& model, const engine::TrainingImages& images, const nn::Preprocess& preprocess,
                       const engine::TrainerOptions& options)
    : Trainer(engine::trained_tensors(model.train_mode())),
      model_(model),
      images_(images),
      preprocess_(preprocess),
      options_(options),
      optimiser_(tensors_, options.adamw) {}

at::Tensor CpuTrainer::images_of(const engine::TrainStep& step) const {
  if (step.images.defined()) return step.images;
  const at::Tensor images = at::empty({int64_t(step.indices.size()), images_.size, images_.size, 3}, at::kByte);
  images_.read(step.indices, images.data_ptr<uint8_t>());
  return nn::normalise(images, preprocess_);
}

void CpuTrainer::step(const engine::TrainStep& step) {
  const at::Tensor labels = images_.labels.index_select(0, at::tensor(step.indices, at::kLong));
  const at::Tensor logits = model_.forward(images_of(step), {.training = true,
                                                             .compute = compute_type(options_.precision),
                                                             .drop_path = options_.drop_path,
                                                             .random = {options_.seed, step.number}});
  const at::Tensor loss = loss_of(logits, labels, step.teacher, options_.distillation);
  sums_.last_loss = loss.item<double>();
  sums_.last_norm = 0;
  if (std::isfinite(sums_.last_loss)) {
    loss.backward();
    sums_.last_norm = optimiser_.gradient_norm();
  }
  if (!std::isfinite(sums_.last_loss) || !std::isfinite(sums_.last_norm)) {
    optimiser_.drop_gradients();
    if (sums_.bad_step >= 0) return;
    sums_.bad_step = int64_t(step.number);
    sums_.bad_loss = sums_.last_loss;
    sums_.bad_norm = sums_.last_norm;
    return;
  }
  optimiser_.set_steps(int64_t(step.number));
  optimiser_.step(step.lr, step.merge_lr);
  model_.weights_changed();
  sums_.loss_sum += sums_.last_loss * double(step.indices.size());
  sums_.correct += (logits.detach().argmax(1) == labels).sum().item<int64_t>();
  sums_.images += int64_t(step.indices.size());
}

engine::StepSums CpuTrainer::collect() {
  return std::exchange(sums_, {});
}

void CpuTrainer::take_over() {
  model_.weights_changed();
}

}  // namespace pyra::train
