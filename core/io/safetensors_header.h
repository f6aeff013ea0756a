// The header of a safetensors file: JSON text <-> names, dtypes, shapes, offsets. No file and no tensor in sight.
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "io/safetensors.h"

namespace pyra::io {

using Entries = std::map<std::string, SafetensorsFile::Entry, std::less<>>;

/// The format's own limit on the header, and ours on what it may hold; far above any published model.
inline constexpr uint64_t kMaxHeaderBytes = 100'000'000;
inline constexpr size_t kMaxEntries = 100'000, kMaxRank = 64;

struct SafetensorsHeader {
  Metadata metadata;
  Entries entries;
  uint64_t data_bytes = 0;  ///< what the entries cover, from 0 and without holes
};

/// Parses and checks everything that can be checked without the file's size. Error(input), `where` opens the text.
[[nodiscard]] SafetensorsHeader parse_safetensors_header(std::string_view text, const std::string& where);

/// One dtype of the format.
struct SafetensorsDtype {
  std::string_view name;
  uint64_t bits;                       ///< of one element
  std::optional<at::ScalarType> type;  ///< empty: legal in a file, but not read by this program
};
/// nullptr for a name that the format does not have.
[[nodiscard]] const SafetensorsDtype* find_dtype(std::string_view name);
/// nullptr for a type that the format or this program does not have. Later in the list means written earlier.
[[nodiscard]] const SafetensorsDtype* find_dtype(at::ScalarType type);

}  // namespace pyra::io
