#include "tasks/tuned_model.h"

#include <cstring>

#include "base/error.h"
#include "data/loader.h"
#include "tasks/run_model.h"

namespace pyra::tasks {
namespace {

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
  check_finite(model, recipe.model);
  change_preprocess(model.file.preprocess, recipe);
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

namespace {

/// Eight bytes a turn instead of FNV's one: a model of 86 M parameters takes a quarter of a second.
class Fingerprint {
 public:
  void add_head(std::string_view name, at::IntArrayRef sizes) {
    add_bytes(name.data(), name.size());
    for (const int64_t size : sizes) mix(uint64_t(size));
  }
  void add_bytes(const void* from, size_t count) {
    const char* bytes = static_cast<const char*>(from);
    for (; count >= 8; bytes += 8, count -= 8) {
      uint64_t word;
      std::memcpy(&word, bytes, 8);
      mix(word);
    }
    for (; count > 0; ++bytes, --count) mix(uint8_t(*bytes));
  }
  void add(std::string_view name, const at::Tensor& tensor) {
    add_head(name, tensor.sizes());
    const at::Tensor bytes = tensor.detach().contiguous();
    add_bytes(bytes.const_data_ptr(), bytes.nbytes());
  }
  [[nodiscard]] std::string text() const {
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash_));
    return text;
  }

 private:
  void mix(uint64_t word) {
    hash_ = (hash_ ^ word) * 0x100000001b3;
    hash_ ^= hash_ >> 29;
  }

  uint64_t hash_ = 0xcbf29ce484222325;
};

}  // namespace

std::string fingerprint(const sdk::TensorMap& tensors) {
  Fingerprint all;
  for (const auto& [name, tensor] : tensors) all.add(name, tensor);
  return all.text();
}

std::string fingerprint(const data::StoredSet& set) {
  constexpr int64_t kPiece = 64;
  const int64_t count = set.images.count(), size = set.images.image_size();
  Fingerprint all;
  all.add_head("images", {count, size, size, 3});
  for (int64_t first = 0; first < count; first += kPiece) {
    const at::Tensor piece = set.images.range(first, std::min(kPiece, count - first));
    all.add_bytes(piece.const_data_ptr(), piece.nbytes());
  }
  all.add("labels", set.labels);
  return all.text();
}

std::string statistics_text(const nn::Preprocess& preprocess) {
  const auto& [m, s] = std::tie(preprocess.mean, preprocess.std);
  return cat("mean ", m[0], " ", m[1], " ", m[2], " std ", s[0], " ", s[1], " ", s[2]);
}

std::string tensor_group(const std::string& full_name) {
  for (const char* group : {"peft", "merge", "head"}) {
    if (full_name.starts_with(group)) return group;
  }
  return "model";
}

}  // namespace pyra::tasks
