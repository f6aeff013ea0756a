// Counter-based random numbers (Philox 4x32-10; Salmon et al., SC'11, "Parallel Random Numbers: As Easy as 1, 2, 3").
//
// Everything random in the project (initial values, shuffles, dropout, drop-path, augmentation) is a
// function of (seed, stream, counter) and of nothing else. So a run resumes bit-equal without a saved
// generator, and a mask does not depend on the number of threads.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

namespace pyra {

/// The streams a seed is split into; a new use of randomness takes a new number, so old runs keep theirs.
enum class RandomStream : uint32_t {
  init = 1,
  shuffle = 2,
  dropout = 3,
  drop_path = 4,
  augment = 5,
  split = 6,
  bench = 7,
  verify = 8,
  partition = 9,
  search = 10,
};

class Philox {
 public:
  /// `domain` separates uses within a stream: a step, an epoch, a site.
  Philox(uint64_t seed, RandomStream stream, uint64_t domain = 0) noexcept;

  /// Four independent 32-bit words at position `counter`.
  [[nodiscard]] std::array<uint32_t, 4> block(uint64_t counter) const noexcept;
  /// The 32-bit word at position `index`.
  [[nodiscard]] uint32_t word(uint64_t index) const noexcept { return block(index / 4)[index % 4]; }
  /// Uniform in [0, 1), 24 bits.
  [[nodiscard]] float uniform(uint64_t index) const noexcept { return float(word(index) >> 8) * 0x1p-24f; }
  /// Standard normal (Box-Muller on two words).
  [[nodiscard]] float normal(uint64_t index) const noexcept;
  /// Uniform in [0, bound) without modulo bias that matters (64-bit multiply); bound > 0.
  [[nodiscard]] uint64_t below(uint64_t index, uint64_t bound) const noexcept;
  /// The generator's state, for code that computes many blocks at once: key, and upper half of the counter.
  [[nodiscard]] const std::array<uint32_t, 2>& key() const noexcept { return key_; }
  [[nodiscard]] const std::array<uint32_t, 2>& high() const noexcept { return high_; }
  /// A permutation of 0..n-1 (Fisher-Yates, words 0..n-1 of this generator).
  [[nodiscard]] std::vector<int64_t> permutation(int64_t n) const;

 private:
  std::array<uint32_t, 2> key_;
  std::array<uint32_t, 2> high_;  // upper half of the 128-bit counter: stream and domain
};

}  // namespace pyra
