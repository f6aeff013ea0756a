// AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with PyTorch's order of operations), fp32, on
// tensors that train in place.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "engine/trainer.h"
#include "sdk/tensor_decl.h"

namespace pyra::train {

using engine::AdamWSettings;
using engine::TrainedTensor;

class AdamW {
 public:
  /// `tensors` by full name, as Vit::train_mode() returns them: see engine::trained_tensors.
  AdamW(const sdk::TensorMap& tensors, const AdamWSettings& settings)
      : AdamW(engine::trained_tensors(tensors), settings) {}
  AdamW(std::vector<TrainedTensor> tensors, const AdamWSettings& settings)
      : settings_(settings), tensors_(std::move(tensors)) {}

  /// One step with the gradients the tensors hold, which are dropped afterwards. A tensor without a gradient stays
  /// as it is, its moments too. Element by element, so the result does not depend on the number of threads.
  ///   value *= 1 - lr wd;  m += (1 - b1)(g - m);  v = b2 v + (1 - b2) g²
  ///   value -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
  void step(double lr, double merge_lr);

  /// Euclidean norm over all gradients; infinite or NaN when any is.
  [[nodiscard]] double gradient_norm() const;
  void drop_gradients();

  [[nodiscard]] int64_t steps() const { return steps_; }
  /// In the order of names.
  [[nodiscard]] const std::vector<TrainedTensor>& tensors() const { return tensors_; }
  /// After values and moments were restored in place.
  void set_steps(int64_t steps) { steps_ = steps; }

 private:
  AdamWSettings settings_;
  std::vector<TrainedTensor> tensors_;
  int64_t steps_ = 0;
};

/// Values and moments, sharing storage: "value.<name>", "first.<name>", "second.<name>".
[[nodiscard]] sdk::TensorMap trained_state(const std::vector<TrainedTensor>& tensors);
/// Copies such a state into `tensors`. Error(input) naming the tensor that is missing or of another shape; `where`
/// opens the message.
void restore_trained(const std::vector<TrainedTensor>& tensors, const sdk::TensorMap& state, const std::string& where);

}  // namespace pyra::train
