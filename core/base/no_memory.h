// LibTorch's ways to say that memory is short.
#pragma once
#include <c10/util/Exception.h>

#include <string_view>

namespace pyra {

/// Whether it says that: its CPU allocator throws a plain c10::Error, known by its text alone.
[[nodiscard]] inline bool means_no_memory(const c10::Error& error) {
  if (dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr) return true;
  const std::string_view text = error.what_without_backtrace();
  return text.find("not enough memory") != text.npos || text.find("can't allocate memory") != text.npos;
}

}  // namespace pyra
