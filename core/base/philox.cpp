#include "base/philox.h"

#include <cmath>
#include <numbers>
#include <utility>

namespace pyra {

Philox::Philox(uint64_t seed, RandomStream stream, uint64_t domain) noexcept
    : key_{uint32_t(seed), uint32_t(seed >> 32)},
      // The stream is folded into the top byte, so a domain has 56 bits before it could meet another stream.
      high_{uint32_t(domain), uint32_t(domain >> 32) ^ (uint32_t(stream) << 24)} {}

std::array<uint32_t, 4> Philox::block(uint64_t counter) const noexcept {
  constexpr uint32_t kMultiply0 = 0xD2511F53, kMultiply1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  std::array<uint32_t, 4> x{uint32_t(counter), uint32_t(counter >> 32), high_[0], high_[1]};
  uint32_t k0 = key_[0], k1 = key_[1];
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(kMultiply0) * x[0], p1 = uint64_t(kMultiply1) * x[2];
    x = {uint32_t(p1 >> 32) ^ x[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ x[3] ^ k1, uint32_t(p0)};
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return x;
}

float Philox::normal(uint64_t index) const noexcept {
  const auto words = block(index);
  const float radius = std::sqrt(-2.0f * std::log((float(words[0] >> 8) + 1.0f) * 0x1p-24f));
  return radius * std::cos(2.0f * std::numbers::pi_v<float> * float(words[1] >> 8) * 0x1p-24f);
}

uint64_t Philox::below(uint64_t index, uint64_t bound) const noexcept {
  const auto words = block(index);
  const uint64_t wide = uint64_t(words[0]) << 32 | words[1];
  return uint64_t((static_cast<unsigned __int128>(wide) * bound) >> 64);
}

std::vector<int64_t> Philox::permutation(int64_t n) const {
  std::vector<int64_t> order(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order[size_t(i)] = i;
  for (int64_t i = n - 1; i > 0; --i) std::swap(order[size_t(i)], order[size_t(below(uint64_t(i), uint64_t(i) + 1))]);
  return order;
}

}  // namespace pyra
