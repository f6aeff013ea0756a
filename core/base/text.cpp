#include "base/text.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

namespace pyra {
namespace {

template <class T>
std::string join_any(std::span<const T> items, std::string_view separator) {
  std::ostringstream out;
  for (size_t i = 0; i < items.size(); ++i) out << (i ? separator : std::string_view{}) << items[i];
  return out.str();
}

size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row[b.size()];
}

}  // namespace

std::string join(std::span<const std::string> items, std::string_view separator) {
  return join_any(items, separator);
}

std::string join(std::span<const int64_t> items, std::string_view separator) {
  return join_any(items, separator);
}

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> pieces;
  if (text.empty()) return pieces;
  for (size_t begin = 0;;) {
    const size_t end = text.find(separator, begin);
    pieces.emplace_back(text.substr(begin, end - begin));
    if (end == std::string_view::npos) return pieces;
    begin = end + 1;
  }
}

std::string nearest(std::string_view word, std::span<const std::string> candidates) {
  // A hint further away than a third of the word (at least 2 edits) confuses more than it helps.
  const size_t limit = std::max<size_t>(2, word.size() / 3);
  std::string best;
  size_t best_distance = std::numeric_limits<size_t>::max();
  // The quadratic table is not worth building for words no one typed by hand.
  if (word.size() > 256) return best;
  for (const std::string& candidate : candidates) {
    const size_t distance = edit_distance(word, candidate);
    if (distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best_distance <= limit ? best : std::string{};
}

std::string did_you_mean(std::string_view word, std::span<const std::string> candidates) {
  const std::string hint = nearest(word, candidates);
  return hint.empty() ? std::string{} : cat("; did you mean '", hint, "'?");
}

namespace {

/// How many bytes the control character at `at` has, 0 where there is none: C0 and DEL have one, C1 (U+0080 to U+009F,
/// among them CSI, which opens a terminal's commands as ESC [ does) two.
size_t control_bytes(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0; };
  if (byte(at) == 0xC2) return (byte(at + 1) & 0xE0) == 0x80 ? 2 : 0;
  return byte(at) < 0x20 || byte(at) == 0x7F ? 1 : 0;
}

}  // namespace

std::string printable(std::string_view text, size_t limit) {
  constexpr std::string_view kHex = "0123456789abcdef";
  size_t length = std::min(text.size(), limit);
  // Not in the middle of a UTF-8 character.
  while (length < text.size() && length > 0 && (static_cast<unsigned char>(text[length]) & 0xC0) == 0x80) --length;
  std::string shown;
  for (size_t i = 0, control = 0; i < length; ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if (control == 0) control = control_bytes(text.substr(0, length), i);
    if (control == 0) {
      shown += text[i];
    } else {
      shown.append("\\x").append(1, kHex[byte >> 4]).append(1, kHex[byte & 15]);
      --control;
    }
  }
  if (length < text.size()) shown += "…";
  return shown;
}

std::string fixed(double value, int digits) {
  if (!std::isfinite(value)) return "?";
  char text[400];  // 309 digits before the point at most
  return {text, std::to_chars(text, text + sizeof text, value, std::chars_format::fixed, digits).ptr};
}

std::string grouped(int64_t value) {
  std::string digits = std::to_string(value);
  const size_t first = digits.front() == '-' ? 1 : 0;
  for (size_t at = digits.size(); at > first + 3;) digits.insert(at -= 3, " ");
  return digits;
}

}  // namespace pyra
