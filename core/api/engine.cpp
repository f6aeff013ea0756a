#include "api/engine.h"

#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <mutex>

#include "base/error.h"
#include "data/image.h"
#include "tasks/assemble.h"

namespace pyra {

struct Engine::State {
  tasks::Model model;
  std::string device;
  std::unique_ptr<engine::Engine> engine;
  std::mutex mutex;
};

Engine::Engine(std::unique_ptr<State> state) : state_(std::move(state)) {}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

Engine Engine::load(const std::filesystem::path& file) {
  return load(file, Options{});
}

Engine Engine::load(const std::filesystem::path& file, const Options& options) {
  const c10::InferenceMode no_gradients;
  auto state = std::make_unique<State>();
  state->model = tasks::load_model(file, host::PluginRegistry(options.plugin_path));
  if (state->model.file.config.num_classes == 0)
    fail(ExitCode::input, file.string(), ": the model has no head; fine-tune it first (`pyractl finetune`)");
  state->device = tasks::resolve_device(options.device);
  state->engine = tasks::make_engine(state->model, state->device,
                                     tasks::resolve_precision(options.dtype, state->device), options.exact_gelu);
  return Engine(std::move(state));
}

int64_t Engine::image_size() const {
  return state_->model.file.config.image_size;
}
int64_t Engine::num_classes() const {
  return state_->model.file.config.num_classes;
}
const std::vector<std::string>& Engine::class_names() const {
  return state_->model.file.class_names;
}
const std::string& Engine::device() const {
  return state_->device;
}

std::vector<uint8_t> Engine::prepare(std::span<const uint8_t> encoded) const {
  return data::prepare(data::decode(encoded, "image"), state_->model.file.preprocess).pixels;
}

std::vector<float> Engine::run(std::span<const uint8_t> images) const {
  const int64_t side = image_size(), each = side * side * 3, count = int64_t(images.size()) / each;
  if (count < 1 || int64_t(images.size()) != count * each)
    fail(ExitCode::usage, "Engine::run: got ", images.size(), " bytes, expected a multiple of ", each, " (", side,
         " x ", side, " pixels of 3 bytes)");
  const c10::InferenceMode no_gradients;
  // from_blob takes no const; nothing writes through it.
  const at::Tensor bytes = at::from_blob(const_cast<uint8_t*>(images.data()), {count, side, side, 3}, at::kByte);
  const std::lock_guard lock(state_->mutex);
  const at::Tensor logits = state_->engine->run(bytes).contiguous();
  const float* first = logits.const_data_ptr<float>();
  return {first, first + logits.numel()};
}

}  // namespace pyra
