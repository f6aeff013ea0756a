#include "tasks/finetune.h"

#include <chrono>
#include <cmath>
#include <cstdio>

#include "base/clock.h"
#include "base/error.h"
#include "base/folder_lock.h"
#include "io/atomic_file.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "tasks/bench_machine.h"
#include "tasks/finetune_options.h"
#include "tasks/finetune_state.h"
#include "tasks/machine.h"
#include "tasks/run_folder.h"
#include "tasks/teacher.h"
#include "tasks/training_plan.h"
#include "tasks/tuned_model.h"
#include "train/checkpoint.h"
#include "train/metrics_log.h"

namespace pyra::tasks {
namespace fs = std::filesystem;
namespace {

using Clock = std::chrono::steady_clock;
constexpr int64_t kEvalBatch = 64;

int64_t element_count(const sdk::TensorMap& tensors) {
  int64_t count = 0;
  for (const auto& [name, tensor] : tensors) count += tensor.numel();
  return count;
}

std::string peft_label(const Model& model) {
  return model.vit->peft() ? model.vit->peft()->name : "none";
}

std::map<std::string, std::string> plugin_versions(const Model& model, const host::PluginRegistry& plugins) {
  std::map<std::string, std::string> versions;
  if (const auto* peft = model.vit->peft()) versions["peft " + peft->name] = plugins.info("peft", peft->name).version;
  if (const auto* merge = model.vit->merge()) {
    versions["merge " + merge->name] = plugins.info("merge", merge->name).version;
  }
  return versions;
}

std::string train_note(const train::Loop& loop, double max_seconds) {
  char text[96];
  std::snprintf(text, sizeof text, "loss %.3f  lr %.1e", loop.last_loss(), loop.last_lr());
  if (max_seconds <= 0) return text;
  char clock[48];
  std::snprintf(clock, sizeof clock, "  %.0f of %.0f s", loop.position().seconds, max_seconds);
  return std::string(text) + clock;
}

/// One run, from the recipe to the report.
class Finetune {
 public:
  Finetune(FinetuneOptions options, const host::PluginRegistry& plugins, Progress& progress)
      : options_(std::move(options)),
        recipe_(options_.recipe),
        plugins_(plugins),
        progress_(progress),
        run_{recipe_.out},
        device_(resolve_device(options_.device)),
        dataset_(data::Dataset::open(recipe_.data)),
        plan_(plan_trainings(recipe_, dataset_)),
        model_(make_tuned_model(recipe_, {dataset_.class_names()}, plugins, progress)),
        live_(model_.vit->train_mode()) {
    base_ = base_fingerprint(model_);
    if (!recipe_.train.teacher.empty()) teacher_ = std::make_unique<Teacher>(recipe_, model_.file, device_, plugins);
    for (const auto& [name, tensor] : live_) initial_[name] = tensor.detach().clone();
    state_.identity = {.recipe = io::to_toml(recipe_),
                       .model = cat(base_, " ", statistics_text(model_.file.preprocess),
                                    teacher_ ? cat(" taught by ", teacher_->identity()) : ""),
                       .data = {},
                       .plugins = plugin_versions(model_, plugins),
                       .threads = at::get_num_threads(),
                       .device = device_.substr(0, device_.find(':'))};
  }

  FinetuneReport run();
  DryRunReport dry_run();

 private:
  const data::StoredSet& images(const std::string& split);
  [[nodiscard]] train::LoopSettings settings_of(double lr, const data::StoredSet& set) const;
  void identify_data(const data::StoredSet& set);
  [[nodiscard]] double rate_of(const Training& training) const;
  void take_up(std::optional<train::Checkpoint>& checkpoint);
  void begin_folder();
  void run_training(const Training& training, const train::Checkpoint* checkpoint);
  void one_step(const Training& training, train::Loop& loop);
  [[nodiscard]] bool evaluation_due(const Training& training, const train::Loop& loop) const;
  [[nodiscard]] std::string precision() const { return engine::precision_name(precision_of(recipe_, device_)); }
  void evaluate(const Training& training, train::Loop& loop);
  [[nodiscard]] std::optional<Evaluation> measure(const std::string& split);
  void save(train::Loop& loop);
  void stop_if_asked(train::Loop& loop);
  [[nodiscard]] FinetuneReport report() const;
  [[nodiscard]] std::vector<std::pair<std::string, int64_t>> trained_groups() const;
  [[nodiscard]] std::string resume_command() const;

  const FinetuneOptions options_;
  const io::Recipe& recipe_;
  const host::PluginRegistry& plugins_;
  Progress& progress_;
  RunFolder run_;
  std::optional<FolderLock> lock_;  ///< of it, from the first thing that is read or written
  std::string device_;
  Clock::time_point start_ = Clock::now();
  data::Dataset dataset_;
  std::vector<Training> plan_;
  Model model_;
  std::string base_;  // fingerprint of the model that is adapted
  std::unique_ptr<Teacher> teacher_;
  sdk::TensorMap live_, initial_;  // trained tensors by full name: the model's own, and copies of their first values
  sdk::TensorMap best_;            // copies at the best evaluation of the current training
  std::map<std::string, data::StoredSet> sets_;
  const data::StoredSet* identified_ = nullptr;  // whose fingerprint stands in state_
  FinetuneState state_;
  std::optional<train::MetricsLog> log_;
  train::Position last_position_;
  int64_t saved_step_ = -1;
  int64_t images_per_step_ = 0;
  int64_t device_bytes_ = 0;
  bool resumed_ = false;
};

const data::StoredSet& Finetune::images(const std::string& split) {
  const auto found = sets_.find(split);
  if (found != sets_.end()) return found->second;
  return sets_.emplace(split, data::load_split(dataset_, split, model_.file.preprocess, options_.bad_images, progress_))
      .first->second;
}

train::LoopSettings Finetune::settings_of(double lr, const data::StoredSet& set) const {
  train::LoopSettings settings = loop_settings(recipe_, device_, lr);
  if (teacher_) settings.teacher = teacher_->over(set);
  return settings;
}

void Finetune::identify_data(const data::StoredSet& set) {
  if (identified_ == &set) return;
  state_.identity.data = fingerprint(set);
  identified_ = &set;
}

double Finetune::rate_of(const Training& training) const {
  if (training.lr > 0) return training.lr;
  const auto better = [](const Choice& a, const Choice& b) { return a.accuracy < b.accuracy; };
  return std::max_element(state_.choices.begin(), state_.choices.end(), better)->lr;  // the first of equals
}

FinetuneReport Finetune::run() {
  std::optional<train::Checkpoint> checkpoint;
  if (options_.resume) {
    if (fs::exists(run_.path)) lock_.emplace(run_.path);
    checkpoint = train::read_checkpoint(run_.checkpoint(), progress_);
    if (!checkpoint && fs::exists(run_.report()))
      fail(ExitCode::input, run_.checkpoint().string(),
           ": is gone, and the run was finished: resuming would train it anew, over its result");
  }
  take_up(checkpoint);
  // Room for the images and bad ones among them: known now, not after hours of training.
  for (auto i = size_t(state_.training); i < plan_.size(); ++i) {
    (void)images(plan_[i].train_split);
    (void)images(plan_[i].eval_split);
  }
  begin_folder();
  for (const auto& [group, count] : trained_groups())
    if (count > 0) progress_.note(cat("trains ", group, ": ", grouped(count), " parameters"));
  for (; state_.training < int64_t(plan_.size()); ++state_.training) {
    const Training& training = plan_[size_t(state_.training)];
    run_training(training, checkpoint ? &*checkpoint : nullptr);
    checkpoint.reset();
    if (!training.trial) continue;
    state_.choices.push_back({.lr = training.lr, .accuracy = state_.best->accuracy});
    state_.best.reset();
    state_.evaluated_step = -1;
    if (training.train_split != plan_[size_t(state_.training) + 1].train_split) sets_.erase(training.train_split);
  }
  write_adapter(run_, model_, recipe_, {.classes = {dataset_.class_names()}, .base_fingerprint = base_});
  const FinetuneReport result = report();
  io::write_file(run_.report(), to_json(result) + "\n");
  return result;
}

/// Goes over to what a checkpoint remembers, once it is certain that it is of this run.
void Finetune::take_up(std::optional<train::Checkpoint>& checkpoint) {
  FinetuneState saved;
  const std::string where = run_.checkpoint().string();
  if (checkpoint) {
    saved = parse_state(checkpoint->task, where);
    if (saved.training >= int64_t(plan_.size()) || saved.training > int64_t(saved.choices.size())) {
      fail(ExitCode::input, where, ": stands in training ", saved.training, ", the recipe has ", plan_.size());
    }
  } else if (options_.resume) {
    progress_.note(cat(run_.path.string(), ": no checkpoint yet, starting from the beginning"));
  }
  identify_data(images(plan_[size_t(saved.training)].train_split));
  if (!checkpoint) return;
  check_same_run(saved.identity, state_.identity, run_.path.string(), progress_);
  saved.identity = std::move(state_.identity);
  state_ = std::move(saved);
  resumed_ = true;
}

/// The first thing that is written, after all that can go wrong with recipe, model and data.
void Finetune::begin_folder() {
  std::error_code error;
  fs::create_directories(run_.path, error);
  if (error) fail(ExitCode::output, run_.path.string(), ": cannot be created: ", error.message());
  if (!lock_) {
    lock_.emplace(run_.path);
    check_out(options_);  // another process may have been faster
  }
  if (!resumed_) {
    io::Recipe resolved = recipe_;
    resolved.model = fs::absolute(recipe_.model);
    resolved.data = fs::absolute(recipe_.data);
    resolved.out = fs::absolute(recipe_.out);
    if (teacher_) resolved.train.teacher = fs::absolute(recipe_.train.teacher).string();
    io::write_file(run_.recipe(), io::to_toml(resolved));
  }
  log_.emplace(run_.metrics(), state_.metrics_bytes);
}

void Finetune::run_training(const Training& training, const train::Checkpoint* checkpoint) {
  at::NoGradGuard no_gradients;
  const data::StoredSet& set = images(training.train_split);
  identify_data(set);
  for (auto& [name, tensor] : live_) tensor.detach().copy_(initial_.find(name)->second);
  best_.clear();
  const double max_seconds = recipe_.train.max_seconds;
  train::Loop loop(*model_.vit, set, model_.file.preprocess, settings_of(rate_of(training), set));
  images_per_step_ = loop.images_per_step();
  if (checkpoint) {
    sdk::TensorMap tensors;
    for (const auto& [name, tensor] : checkpoint->tensors) {
      if (name.starts_with("best."))
        best_.emplace(name.substr(5), tensor);
      else
        tensors.emplace(name, tensor);
    }
    loop.restore(checkpoint->position, tensors, run_.checkpoint().string());
    saved_step_ = loop.position().step;
  } else {
    save(loop);
  }
  const bool timed = max_seconds > 0;
  const int64_t total = timed ? 0 : loop.steps_per_epoch() * recipe_.train.epochs * images_per_step_;
  progress_.begin(training.name, total, "images");
  while (true) {
    if (evaluation_due(training, loop)) evaluate(training, loop);
    if (loop.finished()) break;
    stop_if_asked(loop);
    try {
      one_step(training, loop);
    } catch (const train::Diverged& error) {
      fail(ExitCode::untrusted, error.what(), "; lower train.lr",
           recipe_.train.merge_lr > 0 ? " or train.merge_lr" : "", ". The last good checkpoint, of step ", saved_step_,
           ", is in ", run_.checkpoint().string());
    }
    progress_.update(loop.position().step * images_per_step_, train_note(loop, max_seconds));
  }
  progress_.end();
  loop.settle();
  last_position_ = loop.position();
  device_bytes_ = loop.device_bytes() + (teacher_ ? teacher_->device_bytes() : 0);
  if (training.keep_best) {
    for (auto& [name, tensor] : live_) tensor.detach().copy_(best_.find(name)->second);
    model_.vit->weights_changed();
  }
}

void Finetune::one_step(const Training& training, train::Loop& loop) {
  const int64_t every = recipe_.train.checkpoint_every;
  const std::optional<train::EpochReport> epoch = [&] {
    const at::AutoGradMode gradients(true);
    return loop.step(every > 0 && (loop.position().step + 1) % every == 0);
  }();
  if (epoch) {
    log_->append(nlohmann::json{{"kind", "train"},
                                {"training", training.name},
                                {"step", epoch->step},
                                {"epoch", epoch->epoch + 1},
                                {"loss", epoch->loss},
                                {"lr", epoch->lr},
                                {"merge_lr", epoch->merge_lr},
                                {"gradient_norm", epoch->gradient_norm},
                                {"accuracy", epoch->accuracy},
                                {"images_per_second", epoch->images_per_second},
                                {"seconds", epoch->seconds}}
                     .dump());
  }
  const bool due = every > 0 ? loop.position().step % every == 0 : epoch.has_value();
  if (due || loop.finished()) save(loop);
}

bool Finetune::evaluation_due(const Training& training, const train::Loop& loop) const {
  const train::Position& at = loop.position();
  if (at.step == state_.evaluated_step) return false;
  if (loop.finished()) return true;
  return training.eval_every > 0 && at.batch == 0 && at.epoch > 0 && at.epoch % training.eval_every == 0;
}

void Finetune::evaluate(const Training& training, train::Loop& loop) {
  loop.settle();
  std::optional<Evaluation> seen = measure(training.eval_split);
  if (!seen) stop_if_asked(loop);
  seen->epoch = loop.position().epoch;
  seen->step = loop.position().step;
  log_->append(nlohmann::json{{"kind", "eval"},
                              {"training", training.name},
                              {"step", seen->step},
                              {"epoch", seen->epoch},
                              {"split", training.eval_split},
                              {"accuracy", seen->accuracy},
                              {"correct", seen->correct},
                              {"images", seen->images},
                              {"images_per_second", seen->images_per_second}}
                   .dump());
  state_.evaluated_step = seen->step;
  const bool better = !training.keep_best || !state_.best || seen->accuracy > state_.best->accuracy;
  if (!better) return;
  state_.best = seen;
  for (const auto& [name, tensor] : live_) best_[name] = tensor.detach().clone();
  io::write_safetensors(run_.checkpoint() / "best.safetensors", best_);
}

/// None when a signal asked for the end.
std::optional<Evaluation> Finetune::measure(const std::string& split) {
  const data::StoredSet& set = images(split);
  const int64_t total = set.labels.size(0);
  if (total == 0) fail(ExitCode::input, recipe_.data.string(), ": split '", split, "' has no image to evaluate");
  const auto engine = make_engine(model_, device_, precision_of(recipe_, device_), false, recipe_.deterministic);
  Evaluation seen{.images = total};
  const auto start = Clock::now();
  for (int64_t first = 0; first < total; first += kEvalBatch) {
    if (pending_signal()) return std::nullopt;
    const int64_t count = std::min(kEvalBatch, total - first);
    const at::Tensor logits = engine->run(set.images.range(first, count));
    if (!logits.isfinite().all().item<bool>()) {
      fail(ExitCode::untrusted, "the trained model's logits are not finite on split '", split,
           "': training diverged; lower train.lr");
    }
    seen.correct += (logits.argmax(1) == set.labels.narrow(0, first, count)).sum().item<int64_t>();
  }
  seen.accuracy = double(seen.correct) / double(total);
  seen.images_per_second = double(total) / seconds_since(start);
  return seen;
}

void Finetune::save(train::Loop& loop) {
  loop.settle();
  state_.metrics_bytes = log_->synced_size();
  sdk::TensorMap tensors = loop.state();
  if (plan_[size_t(state_.training)].keep_best) {
    for (const auto& [name, tensor] : best_) tensors.emplace("best." + name, tensor);
  }
  train::write_checkpoint(run_.checkpoint(),
                          {.position = loop.position(), .tensors = std::move(tensors), .task = to_json(state_)});
  saved_step_ = loop.position().step;
}

void Finetune::stop_if_asked(train::Loop& loop) {
  const int signal_number = pending_signal();
  if (signal_number == 0) return;
  save(loop);
  fail(static_cast<ExitCode>(128 + signal_number), "stopped by signal ", signal_number, " at step ",
       loop.position().step, "; everything is saved: go on with `", resume_command(), "`");
}

FinetuneReport Finetune::report() const {
  const Training& last = plan_.back();
  const double lr = rate_of(last);
  const double images = double(last_position_.step * images_per_step_);
  FinetuneReport r{.out = run_.path,
                   .arch = model_.file.config.arch,
                   .merge = merge_label(model_),
                   .peft = peft_label(model_),
                   .device = device_,
                   .dtype = precision(),
                   .protocol = recipe_.protocol,
                   .test_selected = last.keep_best,
                   .accuracy = state_.best->accuracy,
                   .correct = state_.best->correct,
                   .test_images = state_.best->images,
                   .train_split = last.train_split,
                   .test_split = last.eval_split,
                   .lr = lr,
                   .merge_lr = recipe_.train.merge_lr > 0 ? recipe_.train.merge_lr : lr,
                   .choices = state_.choices,
                   .selected_epoch = state_.best->epoch,
                   .parameters = parameter_count(model_),
                   .trained_parameters = element_count(live_),
                   .macs = nn::count_macs(model_.file.config, tokens_after(model_)),
                   .epochs = last_position_.epoch,
                   .steps = last_position_.step,
                   .train_seconds = last_position_.seconds,
                   .images_per_second = last_position_.seconds > 0 ? images / last_position_.seconds : 0,
                   .eval_images_per_second = state_.best->images_per_second,
                   .total_seconds = seconds_since(start_),
                   .seed = recipe_.seed,
                   .threads = state_.identity.threads,
                   .device_memory_bytes = device_bytes_,
                   .peak_memory_bytes = PeakMemory::bytes(),
                   .resumed = resumed_,
                   .processor = processor_name(device_),
                   .pyractl_version = version(),
                   .libtorch_version = libtorch_version()};
  for (const std::string& split : {last.train_split, last.eval_split})
    r.skipped_images += int64_t(sets_.at(split).skipped.size());
  return r;
}

std::vector<std::pair<std::string, int64_t>> Finetune::trained_groups() const {
  std::vector<std::pair<std::string, int64_t>> groups;
  for (const char* group : {"head", "model", "peft", "merge"}) {
    int64_t count = 0;
    for (const auto& [name, tensor] : live_) count += tensor_group(name) == group ? tensor.numel() : 0;
    groups.emplace_back(group, count);
  }
  return groups;
}

DryRunReport Finetune::dry_run() {
  const Training& last = plan_.back();
  const double lr = last.lr > 0 ? last.lr : recipe_.train.lr.front();
  const data::StoredSet& set = images(last.train_split);
  (void)images(last.eval_split);
  train::Loop loop(*model_.vit, set, model_.file.preprocess, settings_of(lr, set));
  const nn::VitConfig& config = model_.file.config;
  DryRunReport r{.arch = config.arch,
                 .merge = merge_label(model_),
                 .peft = peft_label(model_),
                 .device = device_,
                 .dtype = precision(),
                 .protocol = recipe_.protocol,
                 .image_size = config.image_size,
                 .tokens = tokens_after(model_),
                 .train_images = set.labels.size(0),
                 .test_images = int64_t(dataset_.split(last.eval_split).size()),
                 .classes = dataset_.num_classes(),
                 .batch = loop.images_per_step(),
                 .steps_per_epoch = loop.steps_per_epoch(),
                 .parameters = parameter_count(model_),
                 .macs = nn::count_macs(config, tokens_after(model_))};
  if (r.tokens.empty()) r.tokens.assign(size_t(config.depth), config.tokens());
  r.tokens.insert(r.tokens.begin(), config.tokens());
  r.trained = trained_groups();
  for (const Training& training : plan_) {
    const auto n = int64_t(dataset_.split(training.train_split).size());
    r.steps += std::max<int64_t>(1, n / recipe_.train.batch) * recipe_.train.epochs;
  }
  (void)loop.step();
  loop.settle();
  r.step_seconds = loop.position().seconds;
  r.device_memory_bytes = loop.device_bytes() + (teacher_ ? teacher_->device_bytes() : 0);
  r.estimated_seconds = double(r.steps) * r.step_seconds;
  if (const double limit = recipe_.train.max_seconds * double(plan_.size()); limit > 0) {
    r.estimated_seconds = std::min(r.estimated_seconds, limit);
  }
  r.peak_memory_bytes = PeakMemory::bytes();
  return r;
}

std::string Finetune::resume_command() const {
  return cat("pyractl finetune --out ", run_.path.string(), " --resume",
             options_.device == "auto" ? "" : " --device " + options_.device,
             options_.bad_images == data::BadImages::skip ? " --bad-images skip" : "");
}

}  // namespace

FinetuneReport finetune(const FinetuneOptions& options, const host::PluginRegistry& plugins, Progress& progress) {
  check_options(options);
  check_out(options);
  return Finetune(with_found_schedule(options, plugins, progress), plugins, progress).run();
}

DryRunReport finetune_dry_run(const FinetuneOptions& options, const host::PluginRegistry& plugins, Progress& progress) {
  check_options(options);
  return Finetune(with_found_schedule(options, plugins, progress), plugins, progress).dry_run();
}

}  // namespace pyra::tasks
