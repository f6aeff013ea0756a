#include "train/loop.h"

#include <ATen/Functions.h>

#include <chrono>

#include "base/clock.h"
#include "train/cpu_trainer.h"

namespace pyra::train {
namespace {

/// Steps from one look at the losses to the next: so many that waiting for them does not show, few enough that a run
/// which diverges stops soon.
constexpr int64_t kStepsAhead = 32;

int64_t steps_in(const data::StoredSet& images, int64_t batch) {
  return std::max<int64_t>(1, images.labels.size(0) / batch);
}

std::unique_ptr<engine::Trainer> make_trainer(nn::Vit& model, const data::StoredSet& images,
                                              const nn::Preprocess& preprocess, const LoopSettings& settings) {
  const int64_t count = images.labels.size(0);
  if (count == 0) fail(ExitCode::input, "there is no image to train on");
  const engine::TrainingImages set{
      .size = images.images.image_size(),
      .labels = images.labels,
      .read = [&images](std::span<const int64_t> indices, uint8_t* to) { images.images.read(indices, to); }};
  const engine::TrainerOptions options{.device = settings.device,
                                       .precision = settings.precision,
                                       .adamw = settings.adamw,
                                       .drop_path = settings.drop_path,
                                       .seed = settings.seed,
                                       .batch = std::min(settings.batch, count),
                                       .deterministic = settings.deterministic,
                                       .distillation = settings.distillation};
  if (settings.device != "cpu") return engine::make_cuda_trainer(model, set, preprocess, options);
  return std::make_unique<CpuTrainer>(model, set, preprocess, options);
}

}  // namespace

Diverged::~Diverged() = default;

Loop::Loop(nn::Vit& model, const data::StoredSet& images, const nn::Preprocess& preprocess,
           const LoopSettings& settings)
    : model_(model),
      images_(images),
      preprocess_(preprocess),
      settings_(settings),
      trainer_(make_trainer(model, images, preprocess, settings)),
      steps_per_epoch_(steps_in(images, settings.batch)) {}

bool Loop::finished() const {
  if (settings_.max_seconds > 0 && position_.seconds >= settings_.max_seconds) return true;
  return position_.epoch >= settings_.schedule.epochs;
}

int64_t Loop::images_per_step() const {
  return std::min(settings_.batch, images_.labels.size(0));
}

double Loop::rate(double peak) const {
  Schedule schedule = settings_.schedule;
  schedule.peak = peak;
  return learning_rate(schedule, schedule_epoch(schedule, position_.epoch, position_.seconds, settings_.max_seconds));
}

engine::TrainStep Loop::next_step() {
  if (order_epoch_ != position_.epoch) {
    order_ = data::epoch_order(images_.labels.size(0), settings_.seed, position_.epoch);
    order_epoch_ = position_.epoch;
  }
  const int64_t begin = position_.batch * images_per_step();
  engine::TrainStep step{.number = uint64_t(position_.step),
                         .lr = rate(settings_.schedule.peak),
                         .merge_lr = 0,
                         .indices = {order_.begin() + begin, order_.begin() + begin + images_per_step()},
                         .images = {},
                         .teacher = {}};
  step.merge_lr = settings_.merge_lr > 0 ? rate(settings_.merge_lr) : step.lr;
  if (settings_.augment.hflip || settings_.augment.random_resized_crop)
    step.images =
        data::make_batch(images_, step.indices, preprocess_, settings_.augment, settings_.seed, position_.epoch).images;
  if (settings_.teacher) step.teacher = settings_.teacher(step);
  return step;
}

std::optional<EpochReport> Loop::step(bool waits) {
  const auto start = std::chrono::steady_clock::now();
  const engine::TrainStep step = next_step();
  last_lr_ = step.lr;
  last_merge_lr_ = step.merge_lr;
  trainer_->step(step);
  ++steps_ahead_;
  const double limit = settings_.max_seconds;
  if (waits || settings_.device == "cpu" || steps_ahead_ >= kStepsAhead || position_.batch + 1 == steps_per_epoch_ ||
      (limit > 0 && position_.seconds + seconds_since(start) >= limit))
    wait();
  const double seconds = seconds_since(start);
  position_.seconds += seconds;
  position_.epoch_seconds += seconds;
  if (limit > 0 && position_.seconds >= limit) wait();
  const EpochReport done = report();
  advance();
  if (position_.batch != 0 && !finished()) return std::nullopt;
  return done;
}

void Loop::wait() {
  if (steps_ahead_ == 0) return;
  steps_ahead_ = 0;
  const engine::StepSums sums = trainer_->collect();
  if (sums.bad_step >= 0)
    throw Diverged(cat("training diverged at step ", sums.bad_step + 1, " (epoch ",
                       sums.bad_step / steps_per_epoch_ + 1, ", learning rate ", last_lr_, "): loss ", sums.bad_loss,
                       ", gradient norm ", sums.bad_norm));
  position_.loss_sum += sums.loss_sum;
  position_.correct += sums.correct;
  position_.images += sums.images;
  last_loss_ = sums.last_loss;
  last_norm_ = sums.last_norm;
}

EpochReport Loop::report() const {
  const double images = double(position_.images);
  return {.step = position_.step + 1,
          .epoch = position_.epoch,
          .loss = position_.loss_sum / images,
          .lr = last_lr_,
          .merge_lr = last_merge_lr_,
          .gradient_norm = last_norm_,
          .accuracy = double(position_.correct) / images,
          .images_per_second = position_.epoch_seconds > 0 ? images / position_.epoch_seconds : 0,
          .seconds = position_.seconds};
}

void Loop::advance() {
  ++position_.step;
  if (++position_.batch < steps_per_epoch_) return;
  position_ = {.step = position_.step, .epoch = position_.epoch + 1, .batch = 0, .seconds = position_.seconds};
}

void Loop::settle() {
  wait();
  trainer_->publish();
  for (const engine::TrainedTensor& t : trainer_->tensors()) {
    if (t.value.detach().isfinite().all().item<bool>()) continue;
    throw Diverged(cat("training diverged by step ", position_.step, " (learning rate ", last_lr_, "): tensor '",
                       t.name, "' is not finite"));
  }
}

sdk::TensorMap Loop::state() const {
  return trained_state(trainer_->tensors());
}

void Loop::restore(const Position& position, const sdk::TensorMap& state, const std::string& where) {
  restore_trained(trainer_->tensors(), state, where);
  trainer_->take_over();
  position_ = position;
}

}  // namespace pyra::train
