#include "kernels/rank.h"

#include <limits>

#include "base/error.h"
#include "support.h"

using namespace pyra;

namespace {

struct Inputs {
  at::Tensor tokens, attention;
};

Inputs random_inputs(int64_t batch, int64_t tokens, int64_t width, uint64_t seed) {
  auto generator = at::detail::createCPUGenerator(seed);
  return {at::randn({batch, tokens, width}, generator, at::TensorOptions()),
          at::rand({batch, tokens}, generator, at::TensorOptions())};
}

}  // namespace

TEST_CASE("rank_tokens equals the reference", "[rank]") {
  struct Counts {
    int64_t tokens, prune, merge;
  };
  const auto counts = GENERATE(Counts{197, 180, 150}, Counts{197, 197, 100}, Counts{65, 59, 51}, Counts{65, 40, 40},
                               Counts{5, 4, 3}, Counts{4, 4, 4});
  const auto width = GENERATE(9, 192);
  const auto protected_tokens = GENERATE(1, 2);
  CAPTURE(counts.tokens, counts.prune, counts.merge, width, protected_tokens);
  const Inputs in = random_inputs(3, counts.tokens, width, uint64_t(counts.tokens + width));
  const auto got = kernels::rank_tokens(in.tokens, in.attention, counts.prune, counts.merge, protected_tokens);
  const auto expected = kernels::rank_tokens_reference(in.tokens.to(at::kDouble), in.attention.to(at::kDouble),
                                                       counts.prune, counts.merge, protected_tokens);
  CHECK(at::equal(got.keep, expected.keep));
  CHECK(at::equal(got.src, expected.src));
  CHECK(at::equal(got.dst, expected.dst));
  CHECK(test::max_difference(got.cosine, expected.cosine) < 1e-6);
  CHECK(got.dst.ge(protected_tokens).all().item<bool>());
}

TEST_CASE("rank_tokens sends ties to the lowest index", "[rank]") {
  const auto got = kernels::rank_tokens(at::full({2, 8, 4}, 0.5), at::full({2, 8}, 0.1), 7, 4, 1);
  CHECK(at::equal(got.keep, at::arange(4, at::kLong).expand({2, 4})));
  CHECK(at::equal(got.src, at::arange(4, 7, at::kLong).expand({2, 3})));
  CHECK(at::equal(got.dst, at::ones({2, 3}, at::kLong)));
}

TEST_CASE("an image's ranking does not depend on its batch mates", "[rank]") {
  const Inputs in = random_inputs(5, 65, 40, 3);
  const auto all = kernels::rank_tokens(in.tokens, in.attention, 60, 40, 1);
  for (int64_t i = 0; i < 5; ++i) {
    const auto one = kernels::rank_tokens(in.tokens.narrow(0, i, 1), in.attention.narrow(0, i, 1), 60, 40, 1);
    CHECK(at::equal(one.keep, all.keep.narrow(0, i, 1)));
    CHECK(at::equal(one.dst, all.dst.narrow(0, i, 1)));
    CHECK(at::equal(one.cosine, all.cosine.narrow(0, i, 1)));
  }
}

TEST_CASE("rank_tokens ranks what is not a number last", "[rank]") {
  Inputs in = random_inputs(1, 9, 8, 1);
  in.attention[0][3] = std::numeric_limits<float>::quiet_NaN();
  const auto got = kernels::rank_tokens(in.tokens, in.attention, 9, 8, 1);
  CHECK(got.src[0][0].item<int64_t>() == 3);
}

TEST_CASE("rank_tokens refuses counts that do not fit", "[rank]") {
  const Inputs in = random_inputs(1, 9, 8, 1);
  const auto call = [&](int64_t prune, int64_t merge) {
    return kernels::rank_tokens(in.tokens, in.attention, prune, merge, 1);
  };
  CHECK_NOTHROW(call(9, 2));
  CHECK_THROWS_AS(call(10, 2), Error);
  CHECK_THROWS_AS(call(3, 4), Error);
  CHECK_THROWS_AS(call(3, 1), Error);
  CHECK_THROWS_AS(kernels::rank_tokens(in.tokens, in.attention.slice(1, 1), 9, 2, 1), Error);
}
