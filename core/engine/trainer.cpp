#include "engine/trainer.h"

#include <ATen/Functions.h>

#include "base/error.h"
#include "engine/cuda_library.h"

namespace pyra::engine {

// Out of line, so that one vtable and one typeinfo serve both libraries.
Trainer::~Trainer() = default;

std::vector<TrainedTensor> trained_tensors(const nn::TensorMap& tensors) {
  std::vector<TrainedTensor> trained;
  for (const auto& [name, value] : tensors) {
    if (value.scalar_type() != at::kFloat || !value.is_contiguous())
      fail(ExitCode::internal, "AdamW: tensor '", name, "' must be contiguous fp32, got ", value.scalar_type());
    trained.push_back({.name = name,
                       .value = value,
                       .first = at::zeros(value.sizes(), value.options().requires_grad(false)),
                       .second = at::zeros(value.sizes(), value.options().requires_grad(false)),
                       .merge_group = name.starts_with("merge.")});
  }
  return trained;
}

std::unique_ptr<Trainer> make_cuda_trainer(nn::Vit& model, const TrainingImages& images,
                                           const nn::Preprocess& preprocess, const TrainerOptions& options) {
  return cuda_library().make_trainer(model, images, preprocess, options);
}

}  // namespace pyra::engine
