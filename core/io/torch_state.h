// What a pickle of torch.save says, without its bytes: which tensors there are and where in which storage they lie.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "io/pickle.h"

namespace pyra::io {

/// Numbers kept outside of the pickle, under a key.
struct TorchStorage {
  at::ScalarType dtype = at::kFloat;
  int64_t elements = 0;
  [[nodiscard]] uint64_t bytes() const { return uint64_t(elements) * c10::elementSize(dtype); }
  bool operator==(const TorchStorage&) const = default;
};

/// A view of a storage; offset and strides in elements. Every element was found to lie inside it.
struct TorchTensor {
  std::string storage;
  int64_t offset = 0;
  std::vector<int64_t> shape, strides;
};

struct TorchState {
  std::map<std::string, TorchStorage, std::less<>> storages;  ///< all of the pickle
  std::map<std::string, TorchTensor> tensors;                 ///< of the state dict
  std::string key;       ///< under which the state dict lay: "model"; "" when it was the whole
  std::string arch;      ///< the architecture that the file names beside it ("arch", or args.model); ""
  int64_t elements = 0;  ///< of all tensors
};

/// The names that such a file may hold: tensors, storages, OrderedDict, and things that are read as inert data.
[[nodiscard]] bool allowed_torch_global(const std::string& name);

/// Finds the state dict (state_dict_ema, model_ema, state_dict, model: the first that is a dict; else the whole) and
/// its tensors. Error(input), `where` opens the text: no dict, no tensors, a key that is no text, a tensor whose size,
/// strides or offset do not fit its storage, two accounts of one storage.
[[nodiscard]] TorchState read_torch_state(const Pickle& pickle, const std::string& where);

}  // namespace pyra::io
