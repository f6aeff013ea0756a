// What a file is by its first bytes: so that an error can say "this is a pickle", not "header too large".
#pragma once
#include <string>
#include <string_view>

namespace pyra::io {

/// How many bytes of a file tell its kind.
inline constexpr size_t kKindBytes = 512;

/// "a zip archive (a PyTorch .pth file?)", "a Git LFS pointer …": with what to do about it where that is known.
/// "" when the bytes are of no kind that is known here.
[[nodiscard]] std::string foreign_kind(std::string_view first_bytes);

}  // namespace pyra::io
