// JSON from others: depth bounded, duplicate keys refused (the library alone keeps the last one silently).
#pragma once
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string_view>

namespace pyra::io {

/// `where` opens every message ("report.json", "model.safetensors: metadata 'pyra'"). Error(input) for what is no
/// JSON (with line and column), a key that stands twice in an object, objects and arrays nested deeper than
/// `max_depth`, NUL bytes and invalid UTF-8.
[[nodiscard]] nlohmann::json parse_json(std::string_view text, std::string_view where, int max_depth = 64);

/// parse_json on a file of at most `limit` bytes.
[[nodiscard]] nlohmann::json read_json(const std::filesystem::path& path, size_t limit = size_t{64} << 20);

/// The library's message without its own prefix: "parse error at line 1, column 5: …".
[[nodiscard]] std::string json_reason(const nlohmann::json::exception& error);

/// "a string", "an integer", "an object" …, for "got" and "expected".
[[nodiscard]] std::string_view json_type(const nlohmann::json& value);

/// Text as a JSON string, quoted; bytes that are not UTF-8 (from paths and command lines) become U+FFFD.
[[nodiscard]] std::string json_quoted(std::string_view text);

}  // namespace pyra::io
