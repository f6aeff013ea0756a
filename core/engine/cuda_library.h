// The CUDA part of the engine, a library of its own (libpyra_cuda.so): loaded when a driver answers.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/soft_pass.h"
#include "engine/trainer.h"
#include "sdk/plugin.h"

namespace pyra::engine {

/// One GPU as the driver describes it.
struct CudaDevice {
  std::string name{};                        ///< "NVIDIA H100 80GB HBM3"
  int major = 0, minor = 0;                  ///< compute capability
  int64_t memory_bytes = 0, free_bytes = 0;  ///< free_bytes only from devices()
  int multiprocessors = 0;
  int clock_mhz = 0;     ///< the highest of the multiprocessors
  std::string driver{};  ///< the CUDA version that the driver supports: "13.0"
};

/// What libpyra_cuda.so's one entry symbol returns. `tag` is compared before anything else is touched.
struct CudaApi {
  const char* tag;
  int (*device_count)();
  CudaDevice (*describe)(int index, bool free_memory);  ///< asking for the free memory starts a context there
  Engine* (*make_engine)(const nn::Vit&, const nn::Preprocess&, const EngineOptions&, int index);
  Trainer* (*make_trainer)(nn::Vit&, const TrainingImages&, const nn::Preprocess&, const TrainerOptions&, int index);
  SoftPass* (*make_soft_pass)(const nn::Vit&, const nn::Preprocess&, const SoftPassOptions&, int index);
};
/// The oldest compute capability that the kernels are built for.
inline constexpr int kOldestCudaMajor = 8;
inline constexpr const char* kCudaEntry = "pyra_cuda_entry";
/// What each side was compiled as: nn::Vit and tensors cross the border.
#define PYRA_CUDA_TAG PYRA_VERSION " " PYRA_ABI_TAG

class CudaLibrary {
 public:
  /// Looks for a driver, then for the library beside this one. Never throws: absent_because() says why it is not there.
  CudaLibrary();
  [[nodiscard]] bool available() const { return api_ != nullptr; }
  [[nodiscard]] const std::string& absent_because() const { return absent_because_; }
  [[nodiscard]] std::vector<CudaDevice> devices() const;
  /// Whether --device auto means the first GPU: it is there and new enough.
  [[nodiscard]] bool first_is_usable() const;
  /// Throws Error(device) when the library, the device ("cuda:INDEX") or its compute capability is missing.
  void check_device(const std::string& device) const;
  /// check_device() first.
  [[nodiscard]] std::unique_ptr<Engine> make_engine(const nn::Vit& model, const nn::Preprocess& preprocess,
                                                    const EngineOptions& options) const;
  [[nodiscard]] std::unique_ptr<Trainer> make_trainer(nn::Vit& model, const TrainingImages& images,
                                                      const nn::Preprocess& preprocess,
                                                      const TrainerOptions& options) const;
  [[nodiscard]] std::unique_ptr<SoftPass> make_soft_pass(const nn::Vit& model, const nn::Preprocess& preprocess,
                                                         const SoftPassOptions& options) const;

 private:
  const CudaApi* api_ = nullptr;
  std::string absent_because_;
};

/// The process's one; loaded on first use and never unloaded.
[[nodiscard]] const CudaLibrary& cuda_library();

}  // namespace pyra::engine
