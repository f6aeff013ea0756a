#include "tasks/finetune_options.h"

#include "base/error.h"
#include "tasks/run_folder.h"
#include "tasks/schedule_search.h"
#include "tasks/tuned_model.h"

namespace pyra::tasks {
namespace fs = std::filesystem;
namespace {

bool holds_something(const fs::path& folder) {
  std::error_code error;
  return fs::exists(folder) && (!fs::is_directory(folder) || !fs::is_empty(folder, error));
}

/// What the search runs: the model of the recipe without its merger, on this device.
FoundSchedule found_for(const io::Recipe& recipe, const std::string& asked_device, ScheduleGoal goal,
                        const host::PluginRegistry& plugins, Progress& progress) {
  const at::InferenceMode no_gradients;
  io::Recipe dense = recipe;
  dense.merge = {.name = "none", .parameters = {}};
  dense.peft = {.name = "none", .parameters = {}};
  dense.schedule.clear();
  const std::string device = resolve_device(asked_device);
  const data::Dataset dataset = data::Dataset::open(recipe.data);
  Model model = make_tuned_model(dense, {dataset.class_names()}, plugins);
  goal.data = recipe.data;
  goal.seed = uint64_t(recipe.seed);
  return find_schedule(model, goal,
                       {.plugins = plugins,
                        .choice = recipe.merge,
                        .proportional_attention = recipe.proportional_attention,
                        .fresh_seed = uint64_t(recipe.seed),
                        .engine = {.device = device, .precision = resolve_precision("auto", device)}},
                       progress);
}

}  // namespace

void check_options(const FinetuneOptions& options) {
  const io::TrainSettings& train = options.recipe.train;
  if (options.recipe.data.empty()) {
    fail(ExitCode::usage, "no data to train on: set `data = \"FOLDER or .tar\"` in the recipe or give --data");
  }
  for (const auto& path : {options.recipe.model, options.recipe.data, options.recipe.out})
    if (!io::is_utf8(path.string()))  // run.toml has to hold it
      fail(ExitCode::usage, "'", printable(path.string()), "' is not valid UTF-8, and a recipe holds nothing else");
  const io::PluginChoice& merge = options.recipe.merge;
  if (merge.name.empty() && !(options.recipe.schedule.empty() && merge.parameters.empty()))
    fail(ExitCode::usage,
         "the recipe's [merge] names no merger, so it would train without: set merge.name too, or merge.name=none");
  const auto at_least = [](const char* key, double value, double minimum) {
    if (!(value >= minimum)) fail(ExitCode::usage, key, " is ", value, ", expected at least ", minimum);
  };
  at_least("train.epochs", double(train.epochs), 1);
  at_least("train.batch", double(train.batch), 1);
  at_least("train.max_seconds", train.max_seconds, 0);
  at_least("train.warmup_epochs", double(train.warmup_epochs), 0);
  at_least("train.checkpoint_every", double(train.checkpoint_every), 0);
  at_least("train.eval_every", double(train.eval_every), 0);
  at_least("train.merge_lr", train.merge_lr, 0);
  for (const double lr : train.lr) {
    if (!(lr > 0)) fail(ExitCode::usage, "train.lr is ", lr, ", expected a positive number");
  }
}

void check_out(const FinetuneOptions& options) {
  const fs::path& out = options.recipe.out;
  if (out.empty()) fail(ExitCode::usage, "no run folder: give --out RUN or set `out = \"RUN\"` in the recipe");
  if (!options.resume && holds_something(out)) {
    fail(ExitCode::usage, out.string(),
         ": is there already and not empty; go on with it by --resume, or give another --out");
  }
}

engine::Precision precision_of(const io::Recipe& recipe, const std::string& device) {
  if (recipe.dtype.empty()) return device == "cpu" ? engine::Precision::fp32 : engine::Precision::bf16;
  const engine::Precision precision = resolve_precision(recipe.dtype, device);
  if (precision == engine::Precision::fp16)
    fail(ExitCode::usage, "dtype fp16: its gradients vanish without loss scaling; train in bf16");
  return precision;
}

train::LoopSettings loop_settings(const io::Recipe& recipe, const std::string& device, double lr) {
  const io::TrainSettings& t = recipe.train;
  return {.schedule = {.peak = lr,
                       .warmup_lr = t.warmup_lr,
                       .min_lr = t.min_lr,
                       .warmup_epochs = t.warmup_epochs,
                       .epochs = t.epochs},
          .merge_lr = t.merge_lr,
          .max_seconds = t.max_seconds,
          .adamw = {.weight_decay = t.weight_decay},
          .batch = t.batch,
          .drop_path = t.drop_path,
          .augment = {.hflip = t.hflip, .random_resized_crop = t.random_resized_crop},
          .seed = uint64_t(recipe.seed),
          .device = device,
          .precision = precision_of(recipe, device),
          .deterministic = recipe.deterministic,
          .distillation = {.weight = t.teacher_weight, .temperature = t.teacher_temperature}};
}

FinetuneOptions with_found_schedule(const FinetuneOptions& options, const host::PluginRegistry& plugins,
                                    Progress& progress) {
  const std::optional<ScheduleGoal> goal = parse_goal(options.recipe.schedule);
  if (!goal) return options;
  FinetuneOptions found = options;
  const RunFolder run{options.recipe.out};
  if (options.resume && fs::exists(run.recipe())) {
    found.recipe.schedule = io::read_recipe(run.recipe(), {}).schedule;
    return found;
  }
  if (options.recipe.merge.name.empty() || options.recipe.merge.name == "none")
    fail(ExitCode::usage, "schedule '", options.recipe.schedule, "' needs a merger: set merge.name too");
  const FoundSchedule answer = found_for(options.recipe, options.device, *goal, plugins, progress);
  found.recipe.schedule = join(answer.remove, ",");
  progress.note(cat("schedule ", options.recipe.schedule, ": removes ", found.recipe.schedule));
  return found;
}

}  // namespace pyra::tasks
