// A model that teaches another one: its logits for the images of a training (`[train] teacher`).
#pragma once
#include <functional>
#include <memory>
#include <string>

#include "data/loader.h"
#include "io/recipe.h"
#include "tasks/assemble.h"
#include "train/loop.h"

namespace pyra::tasks {

class Teacher {
 public:
  /// Reads recipe.train.teacher, any model file. Error(usage) where it cannot teach `student`: other classes or image
  /// size, another normalisation where images are augmented. It computes in the recipe's dtype.
  Teacher(const io::Recipe& recipe, const io::ModelFile& student, const std::string& device,
          const host::PluginRegistry& plugins);
  ~Teacher();

  /// Logits for steps over `set`, which must outlive the function, as must this. Without augmentation each image is
  /// looked at once, before the first step.
  [[nodiscard]] std::function<at::Tensor(const engine::TrainStep&)> over(const data::StoredSet& set);

  /// What it takes on a GPU; 0 on the CPU.
  [[nodiscard]] int64_t device_bytes() const;
  /// Tells whether two teachers are the same.
  [[nodiscard]] std::string identity() const;

 private:
  [[nodiscard]] at::Tensor look(const at::Tensor& images);

  Model model_;
  std::unique_ptr<engine::Engine> engine_;
  bool augmented_;
};

}  // namespace pyra::tasks
