#include "tasks/run_model.h"

#include "base/error.h"
#include "base/progress.h"
#include "tasks/assemble.h"

namespace pyra::tasks {
namespace {

std::string key_of(const std::string& assignment) {
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos || equals == 0) fail(ExitCode::usage, "--set '", assignment, "': expected key=value");
  return assignment.substr(0, equals);
}

bool sets(const std::vector<std::string>& assignments, std::string_view key) {
  return std::any_of(assignments.begin(), assignments.end(), [&](const std::string& a) { return key_of(a) == key; });
}

std::string schedule_text(const sdk::Schedule& schedule) {
  if (!schedule.remove.empty()) return cat("remove ", join(schedule.remove, ","));
  return cat("prune ", join(schedule.prune, ","), " merge ", join(schedule.merge, ","));
}

bool same_counts(const sdk::Schedule& a, const sdk::Schedule& b) {
  return a.remove == b.remove && a.prune == b.prune && a.merge == b.merge;
}

/// The merger carries trained tensors, so all that may be asked for is what it already does.
void check_trained_merge(const Model& model, const io::Recipe& asked, const std::vector<std::string>& set,
                         const host::PluginRegistry& plugins, const std::string& where) {
  const io::MergeSpec& has = *model.file.merge;
  const std::string trained = cat(where, ": its ", has.name, " weights were trained for schedule '", has.schedule.text,
                                  "' (", schedule_text(has.schedule), ")");
  const char* advice = "; leave it out to run the model as trained, or train another with `pyractl finetune`";
  if (sets(set, "merge.name") && asked.merge.name != has.name)
    fail(ExitCode::usage, trained, ", and cannot be exchanged for '", asked.merge.name, "'", advice);
  if (sets(set, "merge.schedule")) {
    const auto merger = plugins.merger(has.name, has.parameters, where);
    const sdk::ModelShape shape = model.file.config.shape();
    const sdk::Schedule wanted = merger->resolve(nn::parse_schedule(asked.schedule, model.file.config), shape);
    if (!same_counts(wanted, has.schedule))
      fail(ExitCode::usage, trained, "; '", asked.schedule, "' (", schedule_text(wanted), ") was asked for: ask for '",
           has.schedule.text, "', or train one with `pyractl finetune --set merge.schedule=", asked.schedule, "`");
  }
  if (sets(set, "merge.proportional_attention") && asked.proportional_attention != has.proportional_attention)
    fail(ExitCode::usage, trained, " with proportional_attention = ", has.proportional_attention ? "true" : "false",
         advice);
  for (const auto& [name, value] : asked.merge.parameters) {
    const auto carried = has.parameters.find(name);
    if (carried == has.parameters.end() || carried->second != value)
      fail(ExitCode::usage, trained, "; its parameter '", name, "' cannot be changed", advice);
  }
}

void set_proportional_attention(Model& model, bool on) {
  const nn::MergeSetup& has = *model.vit->merge();
  model.vit->set_merge(std::make_unique<nn::MergeSetup>(nn::MergeSetup{.name = has.name,
                                                                       .merger = has.merger,
                                                                       .schedule = has.schedule,
                                                                       .learned = has.learned,
                                                                       .proportional_attention = on}));
  model.file.merge->proportional_attention = on;
}

void change_merge(Model& model, const io::Recipe& asked, const std::vector<std::string>& set,
                  const host::PluginRegistry& plugins, const std::string& where) {
  const bool named = sets(set, "merge.name");
  if (named && asked.merge.name == "none") {
    if (sets(set, "merge.schedule")) fail(ExitCode::usage, "--set merge.name=none leaves nothing for merge.schedule");
    if (model.vit->merge()) detach_merge(model);
    return;
  }
  if (model.vit->merge() && !model.vit->merge()->learned.empty())
    return check_trained_merge(model, asked, set, plugins, where);
  if (!named && !model.vit->merge())
    fail(ExitCode::usage, where, " merges no tokens: name a merger too, as in --set merge.name=tome");
  if (!named && !sets(set, "merge.schedule") && asked.merge.parameters.empty())
    return set_proportional_attention(model, asked.proportional_attention);

  io::PluginChoice choice = asked.merge;
  const auto parse = [&](const std::string& text) { return nn::parse_schedule(text, model.file.config); };
  std::optional<sdk::Schedule> schedule;
  if (!asked.schedule.empty()) schedule = parse(asked.schedule);
  bool proportional_attention = asked.proportional_attention;
  if (const auto& has = model.file.merge) {
    if (!named) choice.name = has->name;
    if (choice.name == has->name) choice.parameters.insert(has->parameters.begin(), has->parameters.end());
    // Counts that were searched or read from a file have no other name than themselves.
    if (!sets(set, "merge.schedule"))
      schedule = has->schedule.remove.empty() ? has->schedule : parse(join(has->schedule.remove, ","));
    if (!sets(set, "merge.proportional_attention")) proportional_attention = has->proportional_attention;
  }
  if (!schedule)
    fail(ExitCode::usage, "--set merge.name=", choice.name, " needs a schedule, as in --set merge.schedule=high");
  attach_merge(model, plugins, choice, *schedule, proportional_attention, std::nullopt);
}

}  // namespace

void change_preprocess(nn::Preprocess& preprocess, const io::Recipe& asked) {
  if (asked.image_size) preprocess.size = *asked.image_size;
  if (asked.resize) preprocess.mode = *asked.resize == "crop" ? nn::ResizeMode::crop : nn::ResizeMode::squash;
  // 256 for 224, and in proportion, where the model says nothing that fits.
  if (preprocess.mode == nn::ResizeMode::crop && preprocess.shorter < preprocess.size)
    preprocess.shorter = preprocess.size * 256 / 224;
  if (!asked.mean.empty()) std::copy_n(asked.mean.begin(), 3, preprocess.mean.begin());
  if (!asked.std.empty()) std::copy_n(asked.std.begin(), 3, preprocess.std.begin());
}

void check_keys(const std::vector<std::string>& set, const std::vector<std::string>& known) {
  for (const std::string& assignment : set) {
    const std::string key = key_of(assignment);
    const bool found = std::any_of(known.begin(), known.end(), [&](const std::string& name) {
      return name.ends_with(".*") ? key.starts_with(std::string_view(name).substr(0, name.size() - 1)) : key == name;
    });
    if (!found)
      fail(ExitCode::usage, "--set ", assignment, ": no key '", key, "' here", did_you_mean(key, known),
           " (there are: ", join(known), ")");
  }
}

at::Tensor run_in_batches(engine::Engine& engine, const at::Tensor& images, int64_t batch, std::string_view what) {
  std::vector<at::Tensor> logits;
  for (int64_t first = 0; first < images.size(0); first += batch) {
    stop_if_asked(what);
    logits.push_back(engine.run(images.narrow(0, first, std::min(batch, images.size(0) - first)).contiguous()));
  }
  return at::cat(logits);
}

void stop_if_asked(std::string_view what) {
  if (const int signal_number = pending_signal())
    fail(static_cast<ExitCode>(128 + signal_number), "stopped by signal ", signal_number, " during ", what);
}

Model load_for_running(const RunOptions& options, const host::PluginRegistry& plugins) {
  (void)resolve_device(options.device);
  check_keys(options.set, {"merge.name", "merge.schedule", "merge.proportional_attention", "merge.*", "preprocess.size",
                           "preprocess.resize", "preprocess.mean", "preprocess.std"});
  const io::Recipe asked = io::read_recipe({}, options.set);
  Model model = load_model(options.model, plugins, {.image_size = asked.image_size});
  change_preprocess(model.file.preprocess, asked);
  if (std::any_of(options.set.begin(), options.set.end(), [](const std::string& a) { return a.starts_with("merge."); }))
    change_merge(model, asked, options.set, plugins, options.model.string());
  return model;
}

}  // namespace pyra::tasks
