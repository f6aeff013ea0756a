// What libpyra_cuda.so offers: see engine/cuda_library.h.
#include "base/error.h"
#include "engine/cuda/cuda_engine.h"
#include "engine/cuda/cuda_soft_pass.h"
#include "engine/cuda/cuda_trainer.h"
#include "engine/cuda_library.h"

namespace pyra::engine {
namespace {

int device_count() {
  int count = 0;
  PYRA_CUDA(cudaGetDeviceCount(&count));
  return count;
}

CudaDevice describe(int index, bool free_memory) {
  cudaDeviceProp properties{};
  PYRA_CUDA(cudaGetDeviceProperties(&properties, index));
  CudaDevice device{.name = properties.name,
                    .major = properties.major,
                    .minor = properties.minor,
                    .memory_bytes = int64_t(properties.totalGlobalMem),
                    .multiprocessors = properties.multiProcessorCount};
  int khz = 0, driver = 0;
  PYRA_CUDA(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, index));
  PYRA_CUDA(cudaDriverGetVersion(&driver));
  device.clock_mhz = khz / 1000;
  device.driver = cat(driver / 1000, ".", driver % 1000 / 10);
  if (!free_memory) return device;
  PYRA_CUDA(cudaSetDevice(index));
  size_t free_bytes = 0, total = 0;
  PYRA_CUDA(cudaMemGetInfo(&free_bytes, &total));
  device.free_bytes = int64_t(free_bytes);
  return device;
}

Engine* create_engine(const nn::Vit& model, const nn::Preprocess& preprocess, const EngineOptions& options, int index) {
  return new CudaEngine(model, preprocess, options, index);
}

Trainer* create_trainer(nn::Vit& model, const TrainingImages& images, const nn::Preprocess& preprocess,
                        const TrainerOptions& options, int index) {
  return new CudaTrainer(model, images, preprocess, options, index);
}

SoftPass* create_soft_pass(const nn::Vit& model, const nn::Preprocess& preprocess, const SoftPassOptions& options,
                           int index) {
  return new CudaSoftPass(model, preprocess, options, index);
}

}  // namespace
}  // namespace pyra::engine

extern "C" __attribute__((visibility("default"))) const pyra::engine::CudaApi* pyra_cuda_entry() {
  static const pyra::engine::CudaApi api{PYRA_CUDA_TAG,
                                         &pyra::engine::device_count,
                                         &pyra::engine::describe,
                                         &pyra::engine::create_engine,
                                         &pyra::engine::create_trainer,
                                         &pyra::engine::create_soft_pass};
  return &api;
}
