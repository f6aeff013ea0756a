// Recipes back to TOML.
#include "base/error.h"
#include "io/recipe.h"
#include "io/toml_value.h"

namespace pyra::io {
namespace {

std::string toml_list(const auto& items, const auto& text_of) {
  std::string text = "[";
  for (size_t i = 0; i < items.size(); ++i) text += cat(i ? ", " : "", text_of(items[i]));
  return text + "]";
}

std::string text_of(bool value) {
  return value ? "true" : "false";
}
std::string text_of(int64_t value) {
  return std::to_string(value);
}
std::string text_of(double value) {
  return toml_number(value);
}
std::string text_of(const std::string& value) {
  return toml_quoted(value);
}
std::string text_of(const std::vector<std::string>& list) {
  return toml_list(list, toml_quoted);
}
std::string text_of(const std::vector<double>& list) {
  return toml_list(list, toml_number);
}

/// Collects "key = value" lines under a heading.
class Writer {
 public:
  void table(const std::string& name) { text_ += cat("\n[", name, "]\n"); }
  void add(const std::string& key, const auto& value) { text_ += cat(key, " = ", text_of(value), "\n"); }
  void add_path(const std::string& key, const std::filesystem::path& path) {
    if (!path.empty()) add(key, path.string());
  }
  void add_parameters(const PluginChoice& plugin) {
    for (const auto& [name, value] : plugin.parameters) {
      std::visit([&, key = name](const auto& held) { add(key, held); }, value);
    }
  }
  [[nodiscard]] std::string text() && { return std::move(text_); }

 private:
  std::string text_;
};

void add_train(Writer& out, const TrainSettings& train) {
  out.table("train");
  out.add("epochs", train.epochs);
  out.add("max_seconds", train.max_seconds);
  out.add("batch", train.batch);
  out.add("lr", train.lr);
  out.add("merge_lr", train.merge_lr);
  out.add("min_lr", train.min_lr);
  out.add("warmup_lr", train.warmup_lr);
  out.add("warmup_epochs", train.warmup_epochs);
  out.add("weight_decay", train.weight_decay);
  out.add("drop_path", train.drop_path);
  out.add("hflip", train.hflip);
  out.add("random_resized_crop", train.random_resized_crop);
  out.add("checkpoint_every", train.checkpoint_every);
  out.add("eval_every", train.eval_every);
  out.add("teacher", train.teacher);
  out.add("teacher_weight", train.teacher_weight);
  out.add("teacher_temperature", train.teacher_temperature);
}

}  // namespace

std::string to_toml(const Recipe& recipe) {
  Writer out;
  out.add_path("model", recipe.model);
  out.add_path("data", recipe.data);
  out.add_path("out", recipe.out);
  out.add("seed", recipe.seed);
  out.add("protocol", recipe.protocol);
  if (!recipe.dtype.empty()) out.add("dtype", recipe.dtype);
  out.add("new_head", recipe.new_head);
  if (recipe.deterministic) out.add("deterministic", true);
  add_train(out, recipe.train);
  out.table("peft");
  out.add("name", recipe.peft.name);
  out.add_parameters(recipe.peft);
  out.table("merge");
  out.add("name", recipe.merge.name);
  if (!recipe.schedule.empty()) out.add("schedule", recipe.schedule);
  out.add("proportional_attention", recipe.proportional_attention);
  out.add_parameters(recipe.merge);
  out.table("preprocess");
  if (recipe.image_size) out.add("size", *recipe.image_size);
  if (recipe.resize) out.add("resize", *recipe.resize);
  if (!recipe.mean.empty()) out.add("mean", recipe.mean);
  if (!recipe.std.empty()) out.add("std", recipe.std);
  return std::move(out).text();
}

std::string recipe_override(std::string_view key, std::string_view text) {
  return cat(key, "=", toml_quoted(text));
}

}  // namespace pyra::io
