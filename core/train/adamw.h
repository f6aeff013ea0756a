// AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with PyTorch's order of operations), fp32, on
// tensors that train in place.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "sdk/tensor_decl.h"

namespace pyra::train {

struct AdamWSettings {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 1e-4;  ///< decoupled, on every tensor
};

/// A tensor that trains and its two moments, all of one shape, fp32, contiguous.
struct TrainedTensor {
  std::string name;  ///< full name: "head.weight", "merge.pyra.blocks.0.a"
  at::Tensor value;  ///< shares the model's storage
  at::Tensor first, second;
  bool merge_group = false;  ///< takes the merger's learning rate
};

class AdamW {
 public:
  /// `tensors` by full name, as Vit::train_mode() returns them; names that begin with "merge." are the merge group.
  /// Error(internal) for a tensor that is not contiguous fp32.
  AdamW(const sdk::TensorMap& tensors, const AdamWSettings& settings);

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

}  // namespace pyra::train
