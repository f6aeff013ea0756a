#include "engine/engine.h"

#include "base/error.h"
#include "engine/cpu_engine.h"
#include "engine/cuda_library.h"

namespace pyra::engine {

// Out of line, so that one vtable and one typeinfo serve both libraries.
Engine::~Engine() = default;

std::vector<Stage> Engine::profile(const at::Tensor&) {
  return {};
}

const char* precision_name(Precision precision) {
  switch (precision) {
    case Precision::fp32:
      return "fp32";
    case Precision::tf32:
      return "tf32";
    case Precision::bf16:
      return "bf16";
    case Precision::fp16:
      return "fp16";
  }
  return "";
}

std::unique_ptr<Engine> make_engine(const nn::Vit& model, const nn::Preprocess& preprocess,
                                    const EngineOptions& options) {
  if (options.device != "cpu") return cuda_library().make_engine(model, preprocess, options);
  if (options.precision != Precision::fp32 && options.precision != Precision::bf16)
    fail(ExitCode::usage, "dtype ", precision_name(options.precision), ": the CPU computes in fp32 or bf16");
  return std::make_unique<CpuEngine>(model, options.precision == Precision::bf16 ? at::kBFloat16 : at::kFloat,
                                     preprocess);
}

}  // namespace pyra::engine
