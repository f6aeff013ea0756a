// Scores and positions in one word that sorts as both: the cheapest stable descending sort of a few hundred floats.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace pyra::kernels {

/// Ascending keys are descending scores, then ascending positions. What is not a number comes last.
[[nodiscard]] inline uint64_t sort_key(float score, uint32_t position) {
  if (std::isnan(score)) score = -std::numeric_limits<float>::infinity();
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 becomes +0: they tie
  const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(~ascending) << 32 | position;
}

[[nodiscard]] inline uint32_t key_position(uint64_t key) {
  return uint32_t(key);
}

}  // namespace pyra::kernels
