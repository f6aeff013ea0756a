// Files of torch.save: the zip archives of torch 1.6 and later, and what came before. The only place where a pickle is
// read, as data (pickle.h); `pyractl convert` does it in a process of its own.
#pragma once
#include <filesystem>
#include <string>

#include "sdk/tensor_decl.h"

namespace pyra::io {

/// The state dict of a checkpoint.
struct TorchCheckpoint {
  sdk::TensorMap tensors;  ///< in their own dtypes; tensors may share memory, as they did when they were saved
  std::string key, arch;   ///< as in TorchState
  std::string container;   ///< "zip" or "legacy"
};

/// Whether the first bytes are those of a zip archive that is no .npz, or of torch's older format.
[[nodiscard]] bool is_torch_file(const std::filesystem::path& path);

/// Error(input) naming the file and what in it: entries, storages and tensors are compared with each other and with the
/// file's size before anything of a stated size is allocated.
[[nodiscard]] TorchCheckpoint read_torch_file(const std::filesystem::path& path);

}  // namespace pyra::io
