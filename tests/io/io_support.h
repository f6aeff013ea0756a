// What the tests of this room share: files made byte by byte, and the error that a call throws.
#pragma once
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "catch.h"

namespace pyra::test {

inline void put(const std::filesystem::path& path, std::string_view bytes) {
  std::filesystem::remove(path);  // ext4 syncs a file that is truncated and written, which is slow in loops
  std::ofstream(path, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
}

inline std::string get(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline std::string little_endian(uint64_t value) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += char(value >> (8 * i));
  return bytes;
}

/// A safetensors file from its header's text and its data.
inline std::string safetensors_bytes(std::string_view header, std::string_view data = {}) {
  return little_endian(header.size()).append(header).append(data);
}

/// The Error that `call` throws, or nothing; any other exception is let through and fails the test.
template <class Call>
std::optional<Error> error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  return {};
}

/// Checks that `call` throws Error(code) and that its text holds every one of `words`.
inline void check_error(ExitCode code, const std::vector<std::string>& words, const std::function<void()>& call) {
  const auto error = error_of(call);
  REQUIRE(error);
  const std::string message = error->what();
  CHECK(error->code() == code);
  for (const std::string& word : words) {
    INFO("message: " << message << "\nmissing: " << word);
    CHECK(message.find(word) != std::string::npos);
  }
}

/// What the error says that `call` throws, which has to be of this code.
inline std::string message_of(const std::function<void()>& call, ExitCode code) {
  const auto error = error_of(call);
  REQUIRE(error);
  CHECK(error->code() == code);
  return error->what();
}

inline std::filesystem::path golden(const std::string& name) {
  return std::filesystem::path(PYRA_TEST_DATA) / "goldens" / name;
}

}  // namespace pyra::test
