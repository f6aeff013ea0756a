// The model a recipe trains: the base model with the data's head, a PEFT method and maybe a merger.
#pragma once
#include <string>
#include <vector>

#include "base/progress.h"
#include "tasks/assemble.h"

namespace pyra::data {
struct StoredSet;
}

namespace pyra::tasks {

/// What the head has to tell apart.
struct Classes {
  std::vector<std::string> names;  ///< as many as there are classes
};

/// Names that are the numbers 0, 1, … say how many classes there are and nothing else.
[[nodiscard]] bool are_numbered(const std::vector<std::string>& names);

/// Reads recipe.model and makes it ready to train: image size and normalisation of the recipe, the head, [merge] and
/// [peft] with fresh tensors by recipe.seed. The head is kept when it has as many classes and no other names; otherwise
/// (or with recipe.new_head) a new one is made by the seed, and a note says so. A merger that the model already carries
/// stays unless the recipe names another ("none" takes it out).
[[nodiscard]] Model make_tuned_model(const io::Recipe& recipe, const Classes& classes,
                                     const host::PluginRegistry& plugins, Progress& progress = silent_progress());

/// FNV-1a over the names, shapes and bytes of the tensors: tells whether two models are the same.
[[nodiscard]] std::string fingerprint(const sdk::TensorMap& tensors);
/// The same over the images and labels of a set.
[[nodiscard]] std::string fingerprint(const data::StoredSet& set);

/// Mean and deviation that images are normalised with: what a run's identity holds beside the weights.
[[nodiscard]] std::string statistics_text(const nn::Preprocess& preprocess);

/// Tensors that train, by what they belong to: "head", "model" (its own, as BitFit's biases), "peft", "merge".
[[nodiscard]] std::string tensor_group(const std::string& full_name);

}  // namespace pyra::tasks
