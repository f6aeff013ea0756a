#include "engine/soft_pass.h"

#include "engine/cuda_library.h"

namespace pyra::engine {

// Out of line, so that one vtable and one typeinfo serve both libraries.
SoftPass::~SoftPass() = default;

std::unique_ptr<SoftPass> make_cuda_soft_pass(const nn::Vit& model, const nn::Preprocess& preprocess,
                                              const SoftPassOptions& options) {
  return cuda_library().make_soft_pass(model, preprocess, options);
}

}  // namespace pyra::engine
