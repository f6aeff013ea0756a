// NumPy's .npz: a zip archive of .npy files, read strictly. Nothing in it is ever unpickled: object arrays are refused.
// Format: numpy/lib/format.py's own description (NEP 1), versions 1.0 and 2.0.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "sdk/tensor_decl.h"

namespace pyra::io {

/// What a .npy header says.
struct NpyHeader {
  std::string descr;                      ///< as written: "<f4", "|V2"
  std::optional<at::ScalarType> dtype{};  ///< empty: a type of numbers that is no weight's (integers, bool)
  bool fortran_order = false;
  std::vector<int64_t> shape;
  uint64_t bytes = 0;  ///< of the data: shape x dtype
};

/// Parses the dict literal of a header: the keys descr, fortran_order and shape, once each, and nothing else.
/// Error(input), `where` opens the text: another literal, objects, structures, big-endian numbers, a shape whose size
/// overflows.
[[nodiscard]] NpyHeader parse_npy_header(std::string_view text, const std::string& where);

/// The headers of one file, all checked by the constructor: entries, their sizes and what they unpack to are bounded
/// before anything is unpacked. Errors are Error(input) naming file and entry.
class NpzFile {
 public:
  explicit NpzFile(const std::filesystem::path& path);

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  /// By name without ".npy".
  [[nodiscard]] const std::map<std::string, NpyHeader, std::less<>>& arrays() const { return arrays_; }
  /// The arrays whose names `wanted` answers, in C order and their own dtype (|V2 as bfloat16), in one pass.
  [[nodiscard]] sdk::TensorMap read(const std::function<bool(const std::string&)>& wanted) const;

 private:
  std::filesystem::path path_;
  std::map<std::string, NpyHeader, std::less<>> arrays_;
};

/// Whether a file is a zip archive whose first entry is a .npy file.
[[nodiscard]] bool is_npz(const std::filesystem::path& path);

/// 200 times its own size is the most that a file may unpack to.
inline constexpr uint64_t kMaxNpzRatio = 200, kMaxNpzBytes = uint64_t{64} << 30;
inline constexpr size_t kMaxNpzEntries = 10'000;

}  // namespace pyra::io
