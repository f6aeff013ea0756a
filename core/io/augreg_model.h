// Google's ViT checkpoints as published: .npz files of the Flax programs (vision_transformer, "augreg", and
// big_vision).
#pragma once
#include <filesystem>

#include "io/model_file.h"

namespace pyra::io {

/// Names open with nothing, with "opt/target/", or with "params/" (big_vision, whose modules are numbered otherwise and
/// whose blocks may be stacked along axis 0). Kernels become timm's weights and take the road of timm's files; the
/// number of heads stands in their shapes. `head` is kept, `pre_logits` left out as timm does, eps is 1e-6, mean and
/// std are 0.5. Error(input) names file and array: missing, unknown, of another shape, of integers.
/// `options.image_size` is left aside, as in timm_model.
[[nodiscard]] ModelFile read_augreg_model(const std::filesystem::path& path, const ReadModelOptions& options = {});

}  // namespace pyra::io
