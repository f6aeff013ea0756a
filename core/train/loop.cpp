#include "train/loop.h"

#include <chrono>
#include <cmath>

namespace pyra::train {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

int64_t steps_in(const data::ImageSet& images, int64_t batch) {
  return std::max<int64_t>(1, images.labels.size(0) / batch);
}

}  // namespace

Diverged::~Diverged() = default;

Loop::Loop(nn::Vit& model, const data::ImageSet& images, const nn::Preprocess& preprocess, const LoopSettings& settings)
    : model_(model),
      images_(images),
      preprocess_(preprocess),
      settings_(settings),
      optimiser_(model.train_mode(), settings.adamw),
      steps_per_epoch_(steps_in(images, settings.batch)) {
  if (images.labels.size(0) == 0) fail(ExitCode::input, "there is no image to train on");
}

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

data::Batch Loop::next_batch() {
  if (order_epoch_ != position_.epoch) {
    order_ = data::epoch_order(images_.labels.size(0), settings_.seed, position_.epoch);
    order_epoch_ = position_.epoch;
  }
  const int64_t begin = position_.batch * images_per_step();
  const std::vector<int64_t> indices(order_.begin() + begin, order_.begin() + begin + images_per_step());
  return data::make_batch(images_, indices, preprocess_, settings_.augment, settings_.seed, position_.epoch);
}

std::optional<EpochReport> Loop::step() {
  const auto start = std::chrono::steady_clock::now();
  const double lr = rate(settings_.schedule.peak);
  const double merge_lr = settings_.merge_lr > 0 ? rate(settings_.merge_lr) : lr;
  const data::Batch batch = next_batch();
  const at::Tensor logits = model_.forward(batch.images, {.training = true,
                                                          .compute = settings_.compute,
                                                          .drop_path = settings_.drop_path,
                                                          .random = {settings_.seed, uint64_t(position_.step)}});
  const at::Tensor loss = at::cross_entropy_loss(logits, batch.labels);
  last_loss_ = loss.item<double>();
  last_norm_ = 0;
  if (std::isfinite(last_loss_)) {
    loss.backward();
    last_norm_ = optimiser_.gradient_norm();
  }
  if (!std::isfinite(last_loss_) || !std::isfinite(last_norm_)) {
    optimiser_.drop_gradients();
    throw Diverged(cat("training diverged at step ", position_.step + 1, " (epoch ", position_.epoch + 1,
                       ", learning rate ", lr, "): loss ", last_loss_, ", gradient norm ", last_norm_));
  }
  optimiser_.step(lr, merge_lr);
  model_.weights_changed();

  position_.correct += (logits.detach().argmax(1) == batch.labels).sum().item<int64_t>();
  position_.images += batch.labels.size(0);
  position_.loss_sum += last_loss_ * double(batch.labels.size(0));
  last_lr_ = lr;
  last_merge_lr_ = merge_lr;
  const double seconds = seconds_since(start);
  position_.seconds += seconds;
  position_.epoch_seconds += seconds;
  const EpochReport done = report();
  advance();
  if (position_.batch != 0 && !finished()) return std::nullopt;
  return done;
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

void Loop::check_finite() const {
  for (const TrainedTensor& t : optimiser_.tensors()) {
    if (t.value.detach().isfinite().all().item<bool>()) continue;
    throw Diverged(cat("training diverged by step ", position_.step, " (learning rate ", last_lr_, "): tensor '",
                       t.name, "' is not finite"));
  }
}

sdk::TensorMap Loop::state() const {
  sdk::TensorMap state;
  for (const TrainedTensor& t : optimiser_.tensors()) {
    state["value." + t.name] = t.value.detach();
    state["first." + t.name] = t.first;
    state["second." + t.name] = t.second;
  }
  return state;
}

void Loop::restore(const Position& position, const sdk::TensorMap& state, const std::string& where) {
  sdk::TensorMap mine = Loop::state();
  for (auto& [name, target] : mine) {
    const auto found = state.find(name);
    if (found == state.end()) fail(ExitCode::input, where, ": tensor '", name, "' is missing");
    if (found->second.sizes() != target.sizes() || found->second.scalar_type() != at::kFloat) {
      fail(ExitCode::input, where, ": tensor '", name, "' is ", found->second.scalar_type(), " ", found->second.sizes(),
           ", this run needs fp32 ", target.sizes());
    }
  }
  if (mine.size() != state.size()) {
    fail(ExitCode::input, where, ": holds ", state.size(), " tensors, this run has ", mine.size());
  }
  for (auto& [name, target] : mine) target.copy_(state.find(name)->second);
  optimiser_.set_steps(position.step);
  position_ = position;
  model_.weights_changed();
}

}  // namespace pyra::train
