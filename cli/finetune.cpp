// pyractl finetune: train as a recipe says.
#include "tasks/finetune.h"

#include <cstdio>

#include "base/error.h"
#include "command.h"
#include "tasks/assemble.h"

namespace pyra::cli {
namespace {

struct FinetuneCommand {
  std::filesystem::path recipe, model, data, out;
  data::BadImages bad_images = data::BadImages::fail;
  bool resume = false, dry_run = false, new_head = false, deterministic = false;
};

/// The recipe: a file, --set, then the options that have names of their own. A run that goes on without --recipe
/// takes the one it was started with.
io::Recipe read_recipe(const FinetuneCommand& o, const Globals& globals) {
  std::filesystem::path file = o.recipe;
  if (file.empty() && o.resume) {
    if (o.out.empty()) fail(ExitCode::usage, "--resume needs the run: give --out RUN");
    file = o.out / "run.toml";
    if (!std::filesystem::exists(file)) {
      fail(ExitCode::usage, o.out.string(), ": holds no run to go on with (", file.string(), " is missing)");
    }
  }
  io::Recipe recipe = io::read_recipe(file, globals.set);
  if (!o.model.empty()) recipe.model = o.model;
  if (!o.data.empty()) recipe.data = o.data;
  if (!o.out.empty()) recipe.out = o.out;
  if (o.new_head) recipe.new_head = true;
  if (o.deterministic) recipe.deterministic = true;
  if (globals.dtype != "auto") recipe.dtype = globals.dtype;
  return recipe;
}

std::string percent(double share) {
  return fixed(100 * share, 2) + "%";
}

void write_report(std::ostream& out, const tasks::FinetuneReport& r) {
  out << "accuracy    " << percent(r.accuracy) << " of " << r.test_images << " images (" << r.test_split
      << ", protocol " << r.protocol << (r.test_selected ? ", chosen on the test split" : "") << ")\n"
      << "model       " << r.arch << ", " << r.merge << ", " << r.peft << ", " << r.dtype << " on " << r.device << "\n"
      << "parameters  " << grouped(r.parameters) << ", trained " << grouped(r.trained_parameters) << "\n"
      << "MACs        " << grouped(r.macs) << " an image\n"
      << "training    " << r.steps << " steps, " << fixed(r.train_seconds, 1) << " s, " << fixed(r.images_per_second, 1)
      << " images/s, learning rate " << r.lr << "\n";
  for (const tasks::Choice& choice : r.choices) {
    out << "  tried     " << choice.lr << ": " << percent(choice.accuracy) << " on the split for choosing\n";
  }
  if (r.skipped_images > 0) out << "skipped     " << r.skipped_images << " images that do not decode\n";
  out << "run folder  " << r.out.string() << "\n";
}

void write_dry_run(std::ostream& out, const tasks::DryRunReport& r) {
  out << "model       " << r.arch << ", " << r.merge << ", " << r.peft << ", " << r.dtype << " on " << r.device << ", "
      << r.image_size << " px\n"
      << "tokens      " << join(r.tokens, " ") << "\n"
      << "parameters  " << grouped(r.parameters) << ", MACs " << grouped(r.macs) << " an image\n";
  for (const auto& [group, count] : r.trained) {
    if (count > 0) out << "  trains    " << group << ": " << grouped(count) << "\n";
  }
  out << "data        " << r.train_images << " images to train on, " << r.test_images << " to test, " << r.classes
      << " classes\n"
      << "training    " << r.steps << " steps of " << r.batch << " images, protocol " << r.protocol << "\n"
      << "time        one step took " << fixed(r.step_seconds, 3) << " s; about " << fixed(r.estimated_seconds, 0)
      << " s in all\n"
      << "memory      " << fixed(double(r.peak_memory_bytes) / (1 << 20), 0) << " MiB at most so far";
  if (r.device_memory_bytes > 0)
    out << ", " << fixed(double(r.device_memory_bytes) / (1 << 20), 0) << " MiB on the GPU";
  out << "\n"
      << "nothing was written\n";
}

int run(const FinetuneCommand& o, Session& session) {
  tasks::FinetuneOptions options;
  options.recipe = read_recipe(o, session.globals);
  options.device = session.globals.device;
  options.resume = o.resume;
  options.bad_images = o.bad_images;
  if (o.dry_run) {
    const auto report = tasks::finetune_dry_run(options, session.plugins(), session.progress());
    session.print(nlohmann::json::parse(to_json(report)), [&](std::ostream& out) { write_dry_run(out, report); });
    return 0;
  }
  const auto report = tasks::finetune(options, session.plugins(), session.progress());
  session.print(nlohmann::json::parse(to_json(report)), [&](std::ostream& out) { write_report(out, report); });
  return 0;
}

}  // namespace

void add_finetune(CLI::App& root, Session& session) {
  auto options = std::make_shared<FinetuneCommand>();
  CLI::App* command =
      add_command(root, session, "finetune", "Train a PEFT method, a merger and a head as a recipe says");
  command->add_option("--recipe", options->recipe, "Recipe; with --resume the run's own when left out")
      ->type_name("R.toml");
  command->add_option("--model", options->model, "Model to start from, instead of the recipe's")->type_name("MODEL");
  command->add_option("--data", options->data, "Folder or .tar, instead of the recipe's")->type_name("DATA");
  command->add_option("--out", options->out, "Run folder, new or empty")->type_name("RUN");
  add_bad_images_option(*command, options->bad_images);
  command->add_flag("--new-head", options->new_head, "Train a new head even where the model's would fit");
  command->add_flag("--deterministic", options->deterministic,
                    "On a GPU: bit-equal on every machine of its kind, not only with the same cache (slower)");
  command->add_flag("--resume", options->resume, "Go on with the run in --out from its last checkpoint");
  command->add_flag("--dry-run", options->dry_run, "Open and check everything, do one step, leave nothing written");
  command->footer(R"(
--set changes any key of the recipe. Ctrl-C saves within a step and exits with 130; --resume then goes on, and the end is
the same to the last bit as without the break (train.max_seconds = 0; the same GPU and its chosen algorithms in
~/.cache/pyra, or an equal number of threads). A run that diverges exits with 7 and keeps its last good checkpoint.

Examples:
  pyractl finetune --recipe recipes/fashion_mnist_pyra.toml --out runs/first
  pyractl finetune --recipe recipes/fashion_mnist_pyra.toml --out runs/second --set peft.rank=8 --set seed=1
  pyractl finetune --out runs/first --resume
  pyractl finetune --recipe recipes/fashion_mnist_pyra.toml --dry-run)");
  command->callback([options, &session] { session.action = [options, &session] { return run(*options, session); }; });
}

}  // namespace pyra::cli
