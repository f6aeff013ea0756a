// The linear layers of a block, by the shape of the model.
#pragma once
#include "sdk/model_shape.h"
#include "sdk/peft_method.h"

namespace pyra::sdk {

/// A layer of a block with its sizes: qkv is fused, from C to 3C.
[[nodiscard]] LinearSite linear_site(const ModelShape& shape, int64_t block, LinearKind kind);

}  // namespace pyra::sdk
