// Puts a model together: file or architecture, plugins, Vit. Every task starts here.
#pragma once
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "engine/engine.h"
#include "host/plugin_registry.h"
#include "io/model_file.h"
#include "io/recipe.h"
#include "nn/vit.h"

namespace pyra::tasks {

/// A model ready to run, and all that its file said of it. `file.weights` and vit->weights() share storage.
struct Model {
  io::ModelFile file;
  std::unique_ptr<nn::Vit> vit;
};

/// Reads a model file and attaches the merger it carries.
[[nodiscard]] Model load_model(const std::filesystem::path& path, const host::PluginRegistry& plugins,
                               const io::ReadModelOptions& options = {});
/// A model from what a file says, with the merger it carries; `where` opens messages.
[[nodiscard]] Model make_model(io::ModelFile file, const host::PluginRegistry& plugins, const std::string& where);
/// A model of this architecture (timm's name) with random weights: timing needs no file.
[[nodiscard]] Model arch_model(const std::string& arch, uint64_t seed = 0);

/// Attaches a merger by name with a schedule as written ("high", "13", "16,8,4", "file.toml") and updates
/// file.merge. A merger that learns gets fresh tensors by `fresh_seed`; without one it is Error(usage): it has
/// to be trained first (finetune).
void attach_merge(Model& model, const host::PluginRegistry& plugins, const io::PluginChoice& merge,
                  const std::string& schedule, bool proportional_attention, std::optional<uint64_t> fresh_seed);
/// The same with a schedule that is parsed already, resolved or not.
void attach_merge(Model& model, const host::PluginRegistry& plugins, const io::PluginChoice& merge,
                  const sdk::Schedule& schedule, bool proportional_attention, std::optional<uint64_t> fresh_seed);
void detach_merge(Model& model);

/// Error(untrusted) naming the first tensor of the model, or of its merger, that holds a value that is not finite.
void check_finite(const Model& model, const std::filesystem::path& path);

/// Attaches a PEFT method with fresh tensors by seed.
void attach_peft(Model& model, const host::PluginRegistry& plugins, const io::PluginChoice& peft, uint64_t seed);

/// Tokens leaving each block, empty for a dense model; for count_macs.
[[nodiscard]] std::vector<int64_t> tokens_after(const Model& model);
/// "dense", or "<merger>-<schedule>": as benchmark rows and tables name it.
[[nodiscard]] std::string merge_label(const Model& model);
/// Number of elements of the model's own tensors and the merger's, without PEFT's.
[[nodiscard]] int64_t parameter_count(const Model& model);

/// "auto" | "cpu" | "cuda[:i]" -> "cpu" or "cuda:i"; auto is the first GPU where one answers that is new enough. A GPU
/// asked for that is not there is Error(device) that says why, another word Error(usage).
[[nodiscard]] std::string resolve_device(const std::string& device);
/// "auto" -> bf16 where the device is faster in it, else fp32; Error(usage) for a dtype it does not do. `device` as
/// resolved.
[[nodiscard]] engine::Precision resolve_precision(const std::string& dtype, const std::string& device);
/// The same on the CPU, for training.
[[nodiscard]] at::ScalarType compute_dtype(const std::string& dtype);
/// What runs the model on a resolved device; keeps a reference to it.
[[nodiscard]] std::unique_ptr<engine::Engine> make_engine(const Model& model, const std::string& device,
                                                          engine::Precision precision, bool exact_gelu = false,
                                                          bool deterministic = false);
[[nodiscard]] std::string dtype_name(at::ScalarType dtype);  ///< "fp32", "bf16"

}  // namespace pyra::tasks
