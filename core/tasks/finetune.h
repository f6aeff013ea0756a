// Fine-tuning as a recipe says: from model and data to a run folder (docs/architecture.md, "Files").
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/progress.h"
#include "data/loader.h"
#include "host/plugin_registry.h"
#include "io/recipe.h"

namespace pyra::tasks {

struct FinetuneOptions {
  io::Recipe recipe;
  std::string device = "auto";  ///< auto, cpu, cuda[:i]
  /// Go on with the run in recipe.out from its last checkpoint; a changed recipe, model, data set or plugin is refused.
  bool resume = false;
  data::BadImages bad_images = data::BadImages::fail;
};

/// A learning rate that was tried (protocol vtab with several).
struct Choice {
  double lr = 0;
  double accuracy = 0;  ///< on the split kept for choosing
};

struct FinetuneReport {
  std::filesystem::path out;
  std::string arch, merge, peft, device, dtype;
  std::string protocol;
  bool test_selected = false;  ///< the best of several looks at the test split (protocol paper)
  double accuracy = 0;         ///< on test_split; adapter/ holds the tensors it was measured with
  int64_t correct = 0, test_images = 0;
  std::string train_split, test_split;
  double lr = 0, merge_lr = 0;
  std::vector<Choice> choices;  ///< empty when there was one learning rate
  int64_t selected_epoch = 0;   ///< epochs trained before the tensors reported on
  int64_t parameters = 0;       ///< the model's own and the merger's
  int64_t trained_parameters = 0;
  int64_t macs = 0;
  int64_t epochs = 0, steps = 0;  ///< of the last training
  double train_seconds = 0;       ///< of the last training: steps only
  double images_per_second = 0;   ///< over them
  double eval_images_per_second = 0;
  double total_seconds = 0;  ///< of this process, decoding and evaluation included
  int64_t skipped_images = 0;
  int64_t seed = 0;
  int threads = 0;
  int64_t device_memory_bytes = 0;  ///< of the last training on a GPU; 0 on the CPU
  int64_t peak_memory_bytes = 0;    ///< of this process; 0 in reports written before it was kept
  bool resumed = false;
  std::string processor;  ///< the CPU's or GPU's own name; empty in reports written before it was kept
  std::string pyractl_version, libtorch_version;
};

/// Trains, evaluates, and leaves a run folder: run.toml, metrics.jsonl, checkpoint/, adapter/, report.json.
///
/// Protocol "vtab": several learning rates are tried on train800 and judged on val200 (the first of equals); then one
/// training on train800val200, the last epoch, the test split once. Data without such splits: train and test.
/// Protocol "paper": the test split every eval_every epochs (default 10) and at the end; the best is reported and
/// marked test_selected.
///
/// Errors: usage for a folder that holds something already, a recipe that makes no sense, or a resume that does not
/// belong to the run; untrusted when training diverges (nothing bad is saved; the message names step, learning rate
/// and the last checkpoint); interrupted or terminated after a checkpoint, with the command that goes on.
[[nodiscard]] FinetuneReport finetune(const FinetuneOptions& options, const host::PluginRegistry& plugins,
                                      Progress& progress = silent_progress());

/// A JSON document: what report.json holds and --json prints.
[[nodiscard]] std::string to_json(const FinetuneReport& report);
/// A report.json back; Error(input) naming file and key where one is missing or makes no sense.
[[nodiscard]] FinetuneReport read_finetune_report(const std::filesystem::path& path);

struct DryRunReport {
  std::string arch, merge, peft, device, dtype, protocol;
  int64_t image_size = 0;
  std::vector<int64_t> tokens;  ///< entering block 0, then leaving every block
  int64_t train_images = 0, test_images = 0, classes = 0;
  int64_t batch = 0, steps_per_epoch = 0, steps = 0;  ///< steps: of all trainings together, without a time limit
  int64_t parameters = 0, macs = 0;
  std::vector<std::pair<std::string, int64_t>> trained{};  ///< group and number of elements: head, model, peft, merge
  double step_seconds = 0;                                 ///< one step, really done
  double estimated_seconds = 0;                            ///< training time
  int64_t peak_memory_bytes = 0;                           ///< of this process, that step included
  int64_t device_memory_bytes = 0;                         ///< of the GPU; 0 on the CPU
};

/// Opens and checks everything, does one step on one batch, and writes nothing.
[[nodiscard]] DryRunReport finetune_dry_run(const FinetuneOptions& options, const host::PluginRegistry& plugins,
                                            Progress& progress = silent_progress());
[[nodiscard]] std::string to_json(const DryRunReport& report);

}  // namespace pyra::tasks
