// From a run folder to one model file that needs no adapter any more.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <string>

#include "base/progress.h"
#include "host/plugin_registry.h"
#include "nn/vit.h"

namespace pyra::tasks {

struct MergeLoraOptions {
  std::filesystem::path run;      ///< a finished run folder, or an adapter folder in peft's layout
  std::filesystem::path model{};  ///< for an adapter folder: the base model it was trained on
  std::filesystem::path out;      ///< the model file; one that is there already is replaced at the very end
  /// "pyra", "timm", or a new folder: "hf", a model of transformers; "peft", "peft-hf", "peft-hf4", the run's LoRA for
  /// peft, not merged, named for a model of timm, of transformers 5 or of transformers 4.
  std::string format = "pyra";
  bool drop_merge = false;  ///< leave the merger out: no format but pyra can carry one
};

/// How near the model that was written comes to the one that was trained.
struct Verification {
  int64_t images = 0;         ///< of seeded noise
  double max_difference = 0;  ///< of two logits
  double largest_logit = 0;
  int64_t moved_plans = 0;  ///< merge plans of a block that rounding tipped over (see verify_model)
  [[nodiscard]] double relative() const { return largest_logit > 0 ? max_difference / largest_logit : max_difference; }
};

struct MergeLoraReport {
  std::filesystem::path out;
  std::string format{}, arch{}, merge{}, peft{};
  int64_t parameters = 0, macs = 0;
  uint64_t file_bytes = 0;
  Verification verification{};
};

/// Rebuilds the tuned model of a run or of an adapter folder (tasks/peft_adapter.h), merges its PEFT method into the
/// weights in fp32, writes the file beside `out`, reads it back, compares its logits with the tuned model's, and gives
/// it its name only then. The formats that write an adapter are verified alike, the adapter read back onto the run's
/// base model. Errors: usage for a method that cannot be merged (by its name), a format this version does not write, a
/// merging model for another format than pyra without drop_merge; input for a damaged run or adapter; untrusted when
/// the logits differ: no file is left then.
[[nodiscard]] MergeLoraReport merge_lora(const MergeLoraOptions& options, const host::PluginRegistry& plugins,
                                         Progress& progress = silent_progress());

[[nodiscard]] std::string to_json(const MergeLoraReport& report);

/// Largest difference allowed, relative to the largest logit.
inline constexpr double kVerifyTolerance = 1e-4;

/// Runs `written` (what the file `path` holds) and `reference` in fp32 on the same seeded noise; Error(untrusted) with
/// the figures when they differ by more than kVerifyTolerance, or when a logit is not finite.
///
/// Rounding alone may tip a merger's choice between two nearly equal tokens, and another choice is another result. So
/// the file's model follows the choices of `reference`, and everything else is compared; plans that would have been
/// different are counted.
Verification verify_model(const std::filesystem::path& path, const nn::Vit& written, const nn::Vit& reference);
/// The same for a model file that is still to be read.
Verification verify_model(const std::filesystem::path& path, const nn::Vit& reference,
                          const host::PluginRegistry& plugins);

}  // namespace pyra::tasks
