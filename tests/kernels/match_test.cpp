#include "kernels/match.h"

#include <ATen/Parallel.h>

#include <limits>

#include "base/error.h"
#include "support.h"

using namespace pyra;

namespace {

at::Tensor random(at::IntArrayRef shape, uint64_t seed) {
  auto generator = at::detail::createCPUGenerator(seed);
  return at::randn(shape, generator, at::TensorOptions().dtype(at::kFloat));
}

void check_same(const kernels::Matching& got, const kernels::Matching& expected) {
  CHECK(at::equal(got.keep, expected.keep));
  CHECK(at::equal(got.src, expected.src));
  CHECK(at::equal(got.dst, expected.dst));
}

/// Tokens whose norms and products are exact in fp32, with many equal scores among them.
at::Tensor exact_tokens(int64_t batch, int64_t tokens, int64_t width, uint64_t seed) {
  auto generator = at::detail::createCPUGenerator(seed);
  auto metric = at::zeros({batch, tokens, width});
  for (int64_t i = 0; i < batch * tokens; ++i) {
    const auto four = at::randperm(width, generator, at::kLong).slice(0, 0, 4);
    const auto signs = at::randint(0, 2, {4}, generator, at::TensorOptions()) * 2 - 1;
    metric.view({-1, width})[i].index_put_({four}, signs);
  }
  return metric;
}

}  // namespace

TEST_CASE("match_bipartite equals the reference", "[match]") {
  const auto tokens = GENERATE(2, 3, 4, 9, 66, 197);
  const auto width = GENERATE(1, 7, 64, 80);
  const auto protected_tokens = GENERATE(1, 2);
  const int64_t most = (tokens - protected_tokens) / 2;
  const auto r = GENERATE_COPY(int64_t{0}, int64_t{1}, most / 2, most);
  if (r > most) return;
  CAPTURE(tokens, width, protected_tokens, r);
  const auto metric = random({3, tokens, width}, uint64_t(tokens * 100 + width));
  const auto got = kernels::match_bipartite(metric, r, protected_tokens);
  CHECK(got.keep.sizes() == at::IntArrayRef({3, tokens - r}));
  CHECK(got.src.sizes() == at::IntArrayRef({3, r}));
  // With one number a token, every cosine is 1 or -1: the reference's rounding is no truth there.
  if (width == 1) return;
  check_same(got, kernels::match_bipartite_reference(metric.to(at::kDouble), r, protected_tokens));
}

TEST_CASE("match_bipartite sends ties to the lowest index", "[match]") {
  SECTION("all tokens alike") {
    const auto got = kernels::match_bipartite(at::full({2, 9, 8}, 0.3), 3, 1);
    const auto expected_src = at::tensor({2, 4, 6}, at::kLong).expand({2, 3});
    const auto expected_keep = at::tensor({0, 8, 1, 3, 5, 7}, at::kLong).expand({2, 6});
    CHECK(at::equal(got.src, expected_src));
    CHECK(at::equal(got.keep, expected_keep));
    CHECK(at::equal(got.dst, at::full({2, 3}, 2, at::kLong)));
  }
  SECTION("all tokens alike, with a distillation token") {
    const auto got = kernels::match_bipartite(at::full({1, 8, 8}, 0.3), 2, 2);
    CHECK(at::equal(got.src, at::tensor({2, 4}, at::kLong).view({1, 2})));
    CHECK(at::equal(got.keep, at::tensor({0, 1, 6, 3, 5, 7}, at::kLong).view({1, 6})));
    CHECK(at::equal(got.dst, at::full({1, 2}, 3, at::kLong)));
  }
  SECTION("many equal scores") {
    const auto protected_tokens = GENERATE(1, 2);
    const auto metric = exact_tokens(4, 66, 16, 7);
    check_same(kernels::match_bipartite(metric, 20, protected_tokens),
               kernels::match_bipartite_reference(metric, 20, protected_tokens));
  }
}

TEST_CASE("match_bipartite takes sides as given", "[match]") {
  const std::vector<int64_t> side{0, 3, 4, 5, 9, 11};
  const auto metric = random({2, 13, 24}, 3);
  const auto got = kernels::match_bipartite(metric, 4, 1, side);
  check_same(got, kernels::match_bipartite_reference(metric.to(at::kDouble), 4, 1, side));
  CHECK(got.src.ne(0).all().item<bool>());
}

TEST_CASE("an image's matching does not depend on its batch mates nor on threads", "[match]") {
  const auto metric = random({7, 101, 48}, 11);
  const auto all = kernels::match_bipartite(metric, 30, 1);
  for (int64_t i = 0; i < metric.size(0); ++i) {
    const auto one = kernels::match_bipartite(metric.narrow(0, i, 1), 30, 1);
    CHECK(at::equal(one.src, all.src.narrow(0, i, 1)));
    CHECK(at::equal(one.dst, all.dst.narrow(0, i, 1)));
    CHECK(at::equal(one.keep, all.keep.narrow(0, i, 1)));
  }
}

TEST_CASE("match_bipartite takes bf16 and tensors that are not contiguous", "[match]") {
  const auto metric = random({2, 33, 32}, 5).to(at::kBFloat16);
  check_same(kernels::match_bipartite(metric, 9, 1), kernels::match_bipartite(metric.to(at::kFloat), 9, 1));
  const auto wide = random({2, 32, 33}, 5);
  check_same(kernels::match_bipartite(wide.transpose(1, 2), 9, 1),
             kernels::match_bipartite(wide.transpose(1, 2).contiguous(), 9, 1));
}

TEST_CASE("match_bipartite survives zeros and what is not a number", "[match]") {
  auto metric = random({1, 9, 8}, 2);
  metric[0][2].zero_();
  metric[0][5].zero_();
  check_same(kernels::match_bipartite(metric, 4, 1), kernels::match_bipartite_reference(metric.to(at::kDouble), 4, 1));
  metric[0][4].fill_(std::numeric_limits<float>::quiet_NaN());
  const auto got = kernels::match_bipartite(metric, 4, 1);
  CHECK(got.src[0][3].item<int64_t>() == 4);
  CHECK(got.dst.ge(0).all().item<bool>());
  CHECK(got.dst.lt(5).all().item<bool>());
}

TEST_CASE("match_bipartite refuses an r that does not fit", "[match]") {
  const auto metric = random({1, 10, 8}, 1);
  CHECK_NOTHROW(kernels::match_bipartite(metric, 4, 1));
  CHECK_THROWS_AS(kernels::match_bipartite(metric, 5, 1), Error);
  CHECK_THROWS_AS(kernels::match_bipartite(metric, -1, 1), Error);
  CHECK_THROWS_AS(kernels::match_bipartite(metric[0], 1, 1), Error);
  CHECK_THROWS_AS(kernels::match_bipartite(random({1, 2, 8}, 1), 1, 1), Error);
  CHECK_THROWS_AS(kernels::match_bipartite(metric.to(at::kMeta), 1, 1), Error);
}
