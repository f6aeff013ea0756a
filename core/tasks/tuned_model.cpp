#include "tasks/tuned_model.h"

#include <cstring>

#include "base/error.h"

namespace pyra::tasks {
namespace {

void apply_preprocess(nn::Preprocess& preprocess, const io::Recipe& recipe) {
  if (recipe.image_size) preprocess.size = *recipe.image_size;
  if (recipe.resize) preprocess.mode = *recipe.resize == "crop" ? nn::ResizeMode::crop : nn::ResizeMode::squash;
  if (!recipe.mean.empty()) std::copy_n(recipe.mean.begin(), 3, preprocess.mean.begin());
  if (!recipe.std.empty()) std::copy_n(recipe.std.begin(), 3, preprocess.std.begin());
}

/// Why the model's head does not fit, or "".
std::string head_problem(const io::ModelFile& file, const Classes& classes, bool new_head) {
  const auto count = int64_t(classes.names.size());
  if (new_head) return "a new one was asked for";
  if (file.config.num_classes == 0) return "the model has none";
  if (file.config.num_classes != count) return cat("the model's has ", file.config.num_classes, " classes");
  if (file.class_names.empty() || are_numbered(file.class_names) || are_numbered(classes.names)) return "";
  for (size_t i = 0; i < classes.names.size(); ++i) {
    if (file.class_names[i] == classes.names[i]) continue;
    return cat("class ", i, " is '", file.class_names[i], "' in the model and '", classes.names[i], "' in the data");
  }
  return "";
}

void replace_head(Model& model, int64_t num_classes, uint64_t seed) {
  model.file.config.num_classes = num_classes;
  for (const nn::TensorShape& tensor : nn::tensor_shapes(model.file.config)) {
    if (!tensor.name.starts_with("head")) continue;
    const bool bias = tensor.name.ends_with(".bias");
    model.file.weights[tensor.name] = nn::make_tensor({.name = tensor.name,
                                                       .shape = tensor.shape,
                                                       .init = bias ? sdk::Init::zeros : sdk::Init::gaussian,
                                                       .scale = 0.02},
                                                      seed);
  }
  auto merge = model.vit->merge() ? std::make_unique<nn::MergeSetup>(*model.vit->merge()) : nullptr;
  model.vit = std::make_unique<nn::Vit>(model.file.config, model.file.weights);
  model.vit->set_merge(std::move(merge));
}

void fit_head(Model& model, const io::Recipe& recipe, const Classes& classes, Progress& progress) {
  const std::string problem = head_problem(model.file, classes, recipe.new_head);
  if (!problem.empty()) {
    replace_head(model, int64_t(classes.names.size()), uint64_t(recipe.seed));
    model.file.class_names.clear();
    progress.note(cat("head: new, ", classes.names.size(), " classes (", problem, ")"));
  }
  if (!are_numbered(classes.names)) model.file.class_names = classes.names;
}

}  // namespace

bool are_numbered(const std::vector<std::string>& names) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] != std::to_string(i)) return false;
  }
  return true;
}

Model make_tuned_model(const io::Recipe& recipe, const Classes& classes, const host::PluginRegistry& plugins,
                       Progress& progress) {
  if (recipe.model.empty()) {
    fail(ExitCode::usage, "no model to start from: set `model = \"FILE\"` in the recipe or give --model FILE");
  }
  Model model = load_model(recipe.model, plugins, {.image_size = recipe.image_size});
  apply_preprocess(model.file.preprocess, recipe);
  fit_head(model, recipe, classes, progress);
  const auto seed = uint64_t(recipe.seed);
  if (recipe.merge.name == "none") {
    detach_merge(model);
  } else if (!recipe.merge.name.empty()) {
    if (recipe.schedule.empty()) {
      fail(ExitCode::usage, "[merge] name = '", recipe.merge.name,
           "' needs a schedule: set `schedule = \"high\"` beside it (low, high, N, a,b,c,… or file.toml)");
    }
    attach_merge(model, plugins, recipe.merge, recipe.schedule, recipe.proportional_attention, seed);
  }
  if (!recipe.peft.name.empty() && recipe.peft.name != "none") attach_peft(model, plugins, recipe.peft, seed);
  return model;
}

std::string fingerprint(const sdk::TensorMap& tensors) {
  // Eight bytes a turn instead of FNV's one: a model of 86 M parameters takes a quarter of a second.
  uint64_t hash = 0xcbf29ce484222325;
  const auto mix = [&](uint64_t word) {
    hash = (hash ^ word) * 0x100000001b3;
    hash ^= hash >> 29;
  };
  const auto mix_bytes = [&](const char* bytes, size_t count) {
    for (; count >= 8; bytes += 8, count -= 8) {
      uint64_t word;
      std::memcpy(&word, bytes, 8);
      mix(word);
    }
    for (; count > 0; ++bytes, --count) mix(uint8_t(*bytes));
  };
  for (const auto& [name, tensor] : tensors) {
    mix_bytes(name.data(), name.size());
    for (const int64_t size : tensor.sizes()) mix(uint64_t(size));
    const at::Tensor bytes = tensor.detach().contiguous();
    mix_bytes(static_cast<const char*>(bytes.const_data_ptr()), bytes.nbytes());
  }
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

std::string tensor_group(const std::string& full_name) {
  for (const char* group : {"peft", "merge", "head"}) {
    if (full_name.starts_with(group)) return group;
  }
  return "model";
}

}  // namespace pyra::tasks
