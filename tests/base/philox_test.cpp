#include "base/philox.h"

#include <algorithm>

#include "catch.h"

using namespace pyra;

TEST_CASE("Philox 4x32-10 gives the words of its authors' known-answer test", "[base]") {
  // Random123 kat_vectors: counter and key all zero. Stream and domain sit in the upper counter words.
  const Philox zero(0, RandomStream(0), 0);
  CHECK(zero.block(0) == std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
}

TEST_CASE("a permutation holds every index once and depends on its domain", "[base]") {
  const auto epoch0 = Philox(7, RandomStream::shuffle, 0).permutation(1000);
  auto sorted = epoch0;
  std::sort(sorted.begin(), sorted.end());
  for (int64_t i = 0; i < 1000; ++i) REQUIRE(sorted[size_t(i)] == i);
  CHECK(epoch0 == Philox(7, RandomStream::shuffle, 0).permutation(1000));
  CHECK(epoch0 != Philox(7, RandomStream::shuffle, 1).permutation(1000));
  CHECK(epoch0 != Philox(8, RandomStream::shuffle, 0).permutation(1000));
}

TEST_CASE("uniform and normal numbers have the moments they should", "[base]") {
  const Philox random(1, RandomStream::init);
  double sum = 0, square = 0, normal_sum = 0, normal_square = 0;
  constexpr int kCount = 100'000;
  for (uint64_t i = 0; i < kCount; ++i) {
    const double u = random.uniform(i), z = random.normal(i);
    REQUIRE((u >= 0 && u < 1));
    sum += u, square += u * u, normal_sum += z, normal_square += z * z;
  }
  CHECK(sum / kCount == Approx(0.5).margin(0.005));
  CHECK(square / kCount == Approx(1.0 / 3).margin(0.005));
  CHECK(normal_sum / kCount == Approx(0).margin(0.015));
  CHECK(normal_square / kCount == Approx(1).margin(0.02));
}
