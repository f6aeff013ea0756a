#include "engine/cuda_library.h"

#include <dlfcn.h>

#include <filesystem>

#include "base/error.h"

namespace pyra::engine {
namespace {

/// "" when a CUDA driver is there and sees a GPU, else why not. The driver's own library is asked, so nothing of CUDA
/// has to be installed for the answer "no".
std::string driver_absent_because() {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!driver) return "no NVIDIA driver on this machine (libcuda.so.1 cannot be loaded)";
  const auto init = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
  const auto count = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDeviceGetCount"));
  int devices = 0;
  const int status = init && count ? init(0) : -1;
  if (status != 0) return cat("the NVIDIA driver does not start (cuInit: ", status, "); does `nvidia-smi` work?");
  if (count(&devices) != 0 || devices == 0)
    return "the NVIDIA driver sees no GPU; is CUDA_VISIBLE_DEVICES set to something that leaves one?";
  return {};
}

std::filesystem::path beside_this_library() {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<const void*>(&cuda_library), &info) || !info.dli_fname) return {};
  std::error_code error;
  const auto path = std::filesystem::canonical(info.dli_fname, error);
  return error ? std::filesystem::path() : path.parent_path() / "libpyra_cuda.so";
}

int device_index(const std::string& device) {
  const size_t colon = device.find(':');
  return colon == std::string::npos ? 0 : std::stoi(device.substr(colon + 1));
}

}  // namespace

CudaLibrary::CudaLibrary() {
  absent_because_ = driver_absent_because();
  if (!absent_because_.empty()) return;
  const std::filesystem::path path = beside_this_library();
  std::error_code error;
  if (path.empty() || !std::filesystem::exists(path, error)) {
    absent_because_ = cat("this pyractl was built without its CUDA part (", path.string(),
                          " is not there); build it where nvcc is on the PATH");
    return;
  }
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    absent_because_ =
        cat("the CUDA part does not load: ", dlerror(),
            "; it needs the cuBLASLt of the CUDA Toolkit it was built with (or the PyPI package nvidia-cublas)");
    return;
  }
  const auto entry = reinterpret_cast<const CudaApi* (*)()>(dlsym(library, kCudaEntry));
  const CudaApi* api = entry ? entry() : nullptr;
  if (!api || std::string_view(PYRA_CUDA_TAG) != api->tag) {
    absent_because_ = cat(path.string(), " was built with another version ('", api ? api->tag : "no entry",
                          "', expected '", PYRA_CUDA_TAG, "'); build and install both together");
    return;
  }
  api_ = api;
}

std::vector<CudaDevice> CudaLibrary::devices() const {
  std::vector<CudaDevice> devices;
  for (int i = 0; api_ && i < api_->device_count(); ++i) devices.push_back(api_->describe(i, true));
  return devices;
}

bool CudaLibrary::first_is_usable() const {
  return api_ && api_->device_count() > 0 && api_->describe(0, false).major >= kOldestCudaMajor;
}

void CudaLibrary::check_device(const std::string& name) const {
  if (!api_) fail(ExitCode::device, "--device ", name, ": ", absent_because_, "; or use --device cpu");
  const int index = device_index(name), count = api_->device_count();
  if (index >= count)
    fail(ExitCode::device, "--device ", name, ": this machine has ", count, " GPU", count == 1 ? "" : "s", " (0 to ",
         count - 1, ")");
  const CudaDevice device = api_->describe(index, false);
  if (device.major < kOldestCudaMajor)
    fail(ExitCode::device, "--device ", name, ": ", device.name, " has compute capability ", device.major, ".",
         device.minor, "; needed is ", kOldestCudaMajor, ".0 (Ampere) or newer; use --device cpu");
}

std::unique_ptr<Engine> CudaLibrary::make_engine(const nn::Vit& model, const nn::Preprocess& preprocess,
                                                 const EngineOptions& options) const {
  check_device(options.device);
  return std::unique_ptr<Engine>(api_->make_engine(model, preprocess, options, device_index(options.device)));
}

std::unique_ptr<Trainer> CudaLibrary::make_trainer(nn::Vit& model, const TrainingImages& images,
                                                   const nn::Preprocess& preprocess,
                                                   const TrainerOptions& options) const {
  check_device(options.device);
  return std::unique_ptr<Trainer>(api_->make_trainer(model, images, preprocess, options, device_index(options.device)));
}

std::unique_ptr<SoftPass> CudaLibrary::make_soft_pass(const nn::Vit& model, const nn::Preprocess& preprocess,
                                                      const SoftPassOptions& options) const {
  check_device(options.device);
  return std::unique_ptr<SoftPass>(api_->make_soft_pass(model, preprocess, options, device_index(options.device)));
}

const CudaLibrary& cuda_library() {
  static const CudaLibrary library;
  return library;
}

}  // namespace pyra::engine
