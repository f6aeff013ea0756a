// Files damaged and forged for the fuzzing of readers: the same seed gives the same files everywhere.
#pragma once
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/zip_writer.h"

namespace pyra::fuzz {

/// Not std::uniform_int_distribution, whose numbers are the library's own affair.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint64_t bits() { return engine_(); }
  /// From 0 to limit - 1.
  size_t below(size_t limit) { return limit < 2 ? 0 : size_t(engine_() % limit); }
  bool one_in(size_t n) { return below(n) == 0; }
  template <class Items>
  auto& choose(Items& items) {
    return items[below(std::size(items))];
  }
  /// Around the limits of what integers, counts and sizes can be, or small.
  uint64_t number();

 private:
  std::mt19937_64 engine_;
};

using Words = std::span<const std::string>;

/// A few bytes changed, cut, doubled or replaced by numbers; `words` are what the format is made of.
[[nodiscard]] std::string damage(Random& random, std::string bytes, Words words);
/// The same for text: numbers, words and punctuation rather than bytes.
[[nodiscard]] std::string damage_text(Random& random, std::string text, Words words);

// Damage below a layer of lengths and checksums that stays true, for otherwise nothing but that layer would be tested.
/// A safetensors file with another header, and often the data that it asks for.
[[nodiscard]] std::string forge_safetensors(Random& random, const std::string& bytes, Words words);
/// A zip archive of stored entries, one of them damaged, renamed, doubled or left out; else damage().
[[nodiscard]] std::string forge_zip(Random& random, const std::string& bytes, Words words);
/// A .tar with other fields in its headers.
[[nodiscard]] std::string forge_tar(Random& random, std::string bytes, Words words);
/// A PNG with other chunks.
[[nodiscard]] std::string forge_png(Random& random, const std::string& bytes, Words words);
/// A pickle of torch.save's from nothing, its numbers strange, in its archive or as before 1.6.
[[nodiscard]] std::string forge_checkpoint(Random& random);

/// A .tar of plain files.
[[nodiscard]] std::string tar_bytes(const std::vector<test::ZipEntry>& files);

}  // namespace pyra::fuzz
