#include "fuzz/mutator.h"

#include <algorithm>
#include <cctype>

namespace pyra::fuzz {
namespace {

constexpr size_t kMostBytes = 1 << 20;  // what is doubled again and again ends here

size_t a_length(Random& random, size_t limit) {
  return random.one_in(4) ? random.below(limit + 1) : random.below(std::min<size_t>(limit, 16) + 1);
}

void put_number(Random& random, std::string& bytes, size_t at) {
  const size_t width = size_t{1} << random.below(4);
  const uint64_t value = random.number();
  const bool big_endian = random.one_in(3);
  for (size_t i = 0; i < width && at + i < bytes.size(); ++i)
    bytes[at + i] = char(value >> (8 * (big_endian ? width - 1 - i : i)));
}

void damage_once(Random& random, std::string& bytes, Words words) {
  const size_t at = random.below(bytes.size() + 1), rest = bytes.size() - at;
  switch (random.below(9)) {
    case 0:
      if (rest > 0) bytes[at] = char(bytes[at] ^ (1 << random.below(8)));
      break;
    case 1:
      if (rest > 0) bytes[at] = char(random.bits());
      break;
    case 2:
      bytes.resize(at);
      break;
    case 3:
      bytes.erase(at, a_length(random, rest));
      break;
    case 4:
      bytes.insert(random.below(bytes.size() + 1), bytes.substr(at, a_length(random, rest)));
      break;
    case 5:
      bytes.insert(at, a_length(random, 64), char(random.bits()));
      break;
    case 6:
      if (!words.empty()) bytes.insert(at, random.choose(words));
      break;
    case 7:
      if (!words.empty()) {
        const std::string& word = random.choose(words);
        bytes.replace(at, std::min(rest, word.size()), word);
      }
      break;
    default:
      put_number(random, bytes, at);
  }
}

struct Span {
  size_t at = 0, length = 0;
};

/// A run of letters that `wanted` answers, from some place on.
Span a_run(Random& random, std::string_view text, int (*wanted)(int)) {
  const auto is = [&](size_t i) { return wanted(static_cast<unsigned char>(text[i])) != 0; };
  size_t at = random.below(text.size());
  while (at < text.size() && !is(at)) ++at;
  size_t end = at;
  while (end < text.size() && is(end)) ++end;
  return {at, end - at};
}

void damage_text_once(Random& random, std::string& text, Words words) {
  static const std::string kNumbers[] = {
      "0",   "1",    "-1",   "-0",   "0.5", "1e308", "1e-320", "-1e400",
      "NaN", "true", "null", "\"\"", "[]",  "{}",    "\"x\"",  "18446744073709551616",
      "007"};
  static const std::string kPieces[] = {
      "{",  "}",    "[",       "]",       ",",    ":", "\"", "'", "\\", "\n",
      "\r", "\x1b", "\\u0000", "\\ud800", "\xff", ".", " ",  "#", "=",  std::string(1, '\0')};
  if (text.empty()) return damage_once(random, text, words);
  const size_t at = random.below(text.size() + 1);
  switch (random.below(7)) {
    case 0:
    case 1: {
      const Span number = a_run(random, text, std::isdigit);
      text.replace(number.at, number.length,
                   random.one_in(3) ? random.choose(kNumbers) : std::to_string(random.number()));
      break;
    }
    case 2: {
      const Span word = a_run(random, text, std::isalpha);
      text.replace(word.at, word.length, words.empty() ? random.choose(kPieces) : random.choose(words));
      break;
    }
    case 3:
      text.insert(at, random.choose(kPieces));
      break;
    case 4: {
      const Span word = a_run(random, text, std::isgraph);
      text.insert(at, text.substr(word.at, word.length));
      break;
    }
    case 5:
      text.insert(at, random.choose(kNumbers));
      break;
    default:
      damage_once(random, text, words);
  }
}

template <class Once>
std::string often(Random& random, std::string bytes, Words words, Once&& once) {
  for (size_t times = 1 + random.below(random.one_in(3) ? 8 : 2); times > 0; --times) once(random, bytes, words);
  if (bytes.size() > kMostBytes) bytes.resize(kMostBytes);
  return bytes;
}

}  // namespace

uint64_t Random::number() {
  const uint64_t power = uint64_t{1} << below(64);
  switch (below(6)) {
    case 0:
      return power;
    case 1:
      return power - 1;
    case 2:
      return ~power;
    case 3:
      return ~uint64_t{0} - below(9);
    case 4:
      return bits() >> below(64);
    default:
      return below(300);
  }
}

std::string damage(Random& random, std::string bytes, Words words) {
  return often(random, std::move(bytes), words, damage_once);
}

std::string damage_text(Random& random, std::string text, Words words) {
  return often(random, std::move(text), words, damage_text_once);
}

}  // namespace pyra::fuzz
