// A fine-tuning task that takes milliseconds a step: a small random model and images whose colour is their class.
#pragma once
#include <ATen/ATen.h>

#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "base/philox.h"
#include "goldens.h"
#include "io/io_support.h"
#include "io/model_file.h"
#include "nn/vit.h"
#include "support.h"
#include "tasks/finetune.h"
#include "tiny_vit.h"

namespace pyra::test {

/// A 16 x 16 PPM in which the channel of its class is bright.
inline std::string tiny_image(uint64_t number, int64_t label) {
  std::string bytes = "P6\n16 16\n255\n";
  const Philox random(number, RandomStream::init);
  for (uint64_t i = 0; i < 16 * 16 * 3; ++i) {
    bytes += char(random.below(i, 100) + (int64_t(i % 3) == label ? 150 : 0));
  }
  return bytes;
}

/// Images `begin` to `end` in a split's list file, labels in turn.
inline void put_split(const std::filesystem::path& data, const std::string& split, int64_t begin, int64_t end) {
  std::string lines;
  for (int64_t i = begin; i < end; ++i) {
    const std::string name = "images/" + std::to_string(i) + ".ppm";
    put(data / name, tiny_image(uint64_t(i), i % kTinyClasses));
    lines += name + " " + std::to_string(i % kTinyClasses) + "\n";
  }
  put(data / (split + ".txt"), lines);
}

/// A folder with a model, a VTAB-like data set and a recipe: 12 epochs of 3 steps (24 images and 3 left over).
class TinyTask {
 public:
  TinyTask() {
    std::filesystem::create_directories(folder / "data/images");
    put_split(folder / "data", "train800", 0, 18);
    put_split(folder / "data", "val200", 18, 27);
    put_split(folder / "data", "train800val200", 0, 27);
    put_split(folder / "data", "test", 27, 42);
    io::write_model(folder / "model.safetensors", {.config = tiny_config(),
                                                   .preprocess = {.size = 16},
                                                   .class_names = {},
                                                   .merge = {},
                                                   .weights = nn::random_weights(tiny_config(), 3),
                                                   .provenance = {}});
    put(recipe_file(), recipe_text());
  }

  TempDir folder;

  [[nodiscard]] std::filesystem::path recipe_file() const { return folder / "recipe.toml"; }
  [[nodiscard]] std::string recipe_text() const {
    return "model = \"" + (folder / "model.safetensors").string() + "\"\ndata = \"" + (folder / "data").string() +
           "\"\nseed = 5\n"
           "[train]\nepochs = 12\nbatch = 8\nlr = [0.01]\nwarmup_epochs = 1\nhflip = true\n"
           "[peft]\nname = \"lora\"\nrank = 2\n"
           "[merge]\nname = \"pyra\"\nschedule = \"4,2\"\n";
  }
  [[nodiscard]] io::Recipe recipe(std::vector<std::string> set = {}) const {
    return io::read_recipe(recipe_file(), set);
  }
  /// finetune() into `run`, with recipe keys overridden.
  [[nodiscard]] tasks::FinetuneReport finetune(const std::string& run, std::vector<std::string> set = {},
                                               bool resume = false) const {
    tasks::FinetuneOptions options{.recipe = recipe(std::move(set)), .resume = resume};
    options.recipe.out = folder / run;
    return tasks::finetune(options, built_plugins());
  }
  /// Every file and folder there is, with its size: to see that nothing was written.
  [[nodiscard]] std::set<std::string> listing() const {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder.path())) {
      names.insert(entry.path().string() + (entry.is_regular_file() ? " " + std::to_string(entry.file_size()) : ""));
    }
    return names;
  }
  /// The bytes that a run is judged by.
  [[nodiscard]] std::string adapter_bytes(const std::string& run) const {
    const std::string model = get(folder / (run + "/adapter/adapter_model.safetensors"));
    const std::string merge = get(folder / (run + "/adapter/merge.safetensors"));
    REQUIRE_FALSE(model.empty());
    REQUIRE_FALSE(merge.empty());
    return model + merge;
  }
};

}  // namespace pyra::test
