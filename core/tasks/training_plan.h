// What a protocol asks for, as a list of trainings.
#pragma once
#include <string>
#include <vector>

#include "data/dataset.h"
#include "io/recipe.h"

namespace pyra::tasks {

/// One training from fresh tensors, and how it is judged.
struct Training {
  std::string name;  ///< "lr 0.001" for a trial, "train" for the one that counts
  std::string train_split, eval_split;
  double lr = 0;           ///< 0: the best of the trials before it
  int64_t eval_every = 0;  ///< epochs; 0: only at the end
  bool keep_best = false;  ///< the best evaluation counts; else the last
  bool trial = false;
};

/// Error(usage) for a protocol that is unknown or does not fit the learning rates given; Error(input) when the data
/// lacks a split that it needs.
[[nodiscard]] std::vector<Training> plan_trainings(const io::Recipe& recipe, const data::Dataset& dataset);

/// The first of `names` that the data has; Error(input) naming `purpose` ("train on") and the splits there are.
[[nodiscard]] std::string need_split(const data::Dataset& dataset, const std::vector<std::string>& names,
                                     const char* purpose);

}  // namespace pyra::tasks
