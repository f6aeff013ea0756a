// How much of what a dense model sees in images is left when it merges tokens: needs no labels and no trained head.
#pragma once
#include <ATen/core/Tensor.h>

#include "data/dataset.h"
#include "engine/engine.h"
#include "tasks/assemble.h"

namespace pyra::tasks {

/// Images to judge by, uint8 [n,S,S,3], and their labels (undefined for images that no one labelled).
struct JudgeImages {
  at::Tensor images, labels;
};

/// `count` images of a split, spread evenly over it (data::load_some), without those that cannot be read.
[[nodiscard]] JudgeImages images_of_split(const data::Dataset& dataset, const std::string& split, int64_t count,
                                          const nn::Preprocess& preprocess);
/// Seeded noise with a spectrum that falls with frequency as photographs' do: for models without data at hand.
[[nodiscard]] JudgeImages noise_images(int64_t count, int64_t size);

class Likeness {
 public:
  /// Computes what the dense model of `model` (its merger left out) makes of the images.
  Likeness(const Model& model, JudgeImages images, const engine::EngineOptions& options, int64_t batch);

  /// Mean over images of the cosine between the final features (after the last norm, before the head) of the dense
  /// model and of `model` with the merger it carries now; the dense model's mean is taken off both, or what all images
  /// share would hide what tells them apart. 1: nothing was lost.
  [[nodiscard]] double of(const Model& model) const;

 private:
  [[nodiscard]] at::Tensor features(const Model& model, bool merged) const;

  JudgeImages images_;
  engine::EngineOptions options_;
  int64_t batch_;
  at::Tensor dense_, mean_;
};

/// Correct answers among labelled images, with the 95 % interval of Wilson (1927).
struct SampledAccuracy {
  int64_t images = 0, correct = 0;
  double low = 0, high = 0;
  [[nodiscard]] double share() const { return images > 0 ? double(correct) / double(images) : 0; }
};
[[nodiscard]] SampledAccuracy accuracy_on(const Model& model, const JudgeImages& images,
                                          const engine::EngineOptions& options, int64_t batch);

}  // namespace pyra::tasks
