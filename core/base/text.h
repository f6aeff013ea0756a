// Small text helpers that messages are made of.
#pragma once
#include <cstdint>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace pyra {

/// The parts, written one after another as by operator<<.
template <class... Parts>
[[nodiscard]] std::string cat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

/// "a, b, c".
[[nodiscard]] std::string join(std::span<const std::string> items, std::string_view separator = ", ");
[[nodiscard]] std::string join(std::span<const int64_t> items, std::string_view separator = ", ");

/// `text` split at every `separator`; empty pieces are kept, an empty text gives none.
[[nodiscard]] std::vector<std::string> split(std::string_view text, char separator);

/// The candidate with the smallest edit distance to `word`, or "" when none is near enough to help.
[[nodiscard]] std::string nearest(std::string_view word, std::span<const std::string> candidates);

/// "; did you mean 'x'?" for the nearest candidate, "" when none is near: appended to messages.
[[nodiscard]] std::string did_you_mean(std::string_view word, std::span<const std::string> candidates);

/// Text from a file as a message may show it: control characters as \xNN, cut after `limit` bytes with "…".
[[nodiscard]] std::string printable(std::string_view text, size_t limit = 120);

/// 1234567 as "1 234 567"; for tables.
[[nodiscard]] std::string grouped(int64_t value);

/// With that many digits after the point: "2.50"; "?" for what is not finite.
[[nodiscard]] std::string fixed(double value, int digits);

}  // namespace pyra
