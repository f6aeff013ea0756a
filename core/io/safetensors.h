// safetensors, read strictly: every count is bounded by a constant and by the file's size before it is used.
// Format and limits: the format's own specification (huggingface/safetensors).
#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "sdk/tensor_decl.h"

namespace pyra::io {

using Metadata = std::map<std::string, std::string>;

/// One open file. The header is parsed and checked by the constructor; tensors are read when asked for.
/// Errors are Error(input): path, tensor, got, expected; a file that is something else (pickle, zip, Git LFS
/// pointer, HTML, cut download) is named for what it is.
class SafetensorsFile {
 public:
  struct Entry {
    std::string dtype;  ///< as written: "F32", "F16", "BF16", "I64", "U8" …
    std::vector<int64_t> shape;
    uint64_t begin = 0, end = 0;  ///< bytes, relative to the data
  };

  explicit SafetensorsFile(const std::filesystem::path& path);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&&) noexcept;

  [[nodiscard]] const std::filesystem::path& path() const;
  [[nodiscard]] const Metadata& metadata() const;
  [[nodiscard]] const std::map<std::string, Entry, std::less<>>& entries() const;
  [[nodiscard]] bool contains(std::string_view name) const;
  /// A copy in its own dtype; Error(input) when the name is missing or the dtype is none of LibTorch's.
  [[nodiscard]] at::Tensor tensor(std::string_view name) const;
  [[nodiscard]] sdk::TensorMap tensors() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// A weight as fp32; Error(input) for one that is not F32, F16, BF16 or F64.
[[nodiscard]] at::Tensor read_fp32(const SafetensorsFile& file, const std::string& name);

/// Atomic; tensors may be of any dtype listed by the format that LibTorch has. `format: pt` is always written.
/// Names are sorted, so equal contents give equal bytes.
void write_safetensors(const std::filesystem::path& path, const sdk::TensorMap& tensors, Metadata metadata = {});

}  // namespace pyra::io
