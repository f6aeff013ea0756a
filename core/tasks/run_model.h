// What every task that runs a model file is told, and the model made of it.
#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace pyra::host {
class PluginRegistry;
}
namespace pyra::engine {
class Engine;
}

namespace pyra::io {
struct Recipe;
}
namespace pyra::nn {
struct Preprocess;
}

namespace pyra::tasks {

struct Model;

struct RunOptions {
  std::filesystem::path model;
  std::string device = "auto";  ///< auto, cpu, cuda[:i]
  std::string dtype = "auto";   ///< auto, fp32, bf16 …
  bool exact_gelu = false;      ///< a GPU's bf16 and fp16: GELU by erf instead of its tanh form
  /// "key=value": merge.name ("none" takes the merger out), merge.schedule, merge.proportional_attention, the merger's
  /// own parameters, preprocess.size, .resize, .mean, .std.
  std::vector<std::string> set;
};

/// The model as its file says, changed by `set`. A merger without trained tensors may be exchanged or given another
/// schedule; one with trained tensors (PYRA) asked for anything but what it was trained for is Error(usage). An
/// unknown key is Error(usage) naming the nearest. The device is checked too.
[[nodiscard]] Model load_for_running(const RunOptions& options, const host::PluginRegistry& plugins);

/// Sets what `asked` says of preprocessing.
void change_preprocess(nn::Preprocess& preprocess, const io::Recipe& asked);

/// Throws Error(usage) naming the nearest key unless every "key=value" has a key of `known`; a key ending in ".*"
/// stands for all that begin so.
void check_keys(const std::vector<std::string>& set, const std::vector<std::string>& known);

/// Logits of `images` (as engine::Engine::run takes them), `batch` at a time; `what` is for stop_if_asked.
[[nodiscard]] at::Tensor run_in_batches(engine::Engine& engine, const at::Tensor& images, int64_t batch,
                                        std::string_view what);

/// Between two pieces of work: throws Error(130 or 143) when a signal asked for the end. `what` was being done.
void stop_if_asked(std::string_view what);

}  // namespace pyra::tasks
