#include "kernels/cuda/match.h"

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/match.h"
#include "kernels/tensors.h"

using namespace pyra;
using kernels::cuda::DType;
using test::OnDevice;

namespace {

struct Setup {
  int64_t heads, width, r, protected_tokens;
  std::vector<int64_t> side_a{};  // alternating where empty
};

/// qkv [B,N,3C] whose keys are `keys` [B,N,H,D]; queries and values are numbers that must not matter.
at::Tensor with_keys(const at::Tensor& keys, DType dtype) {
  const auto flat = keys.flatten(2);
  const auto other = test::seeded(flat.sizes(), 77);
  return at::cat({other, flat, other.neg()}, 2).to(test::scalar_type(dtype));
}

/// The metric the kernel should see, in double.
at::Tensor metric_of(const at::Tensor& qkv, const Setup& setup) {
  const int64_t channels = setup.heads * setup.width;
  return qkv.narrow(2, channels, channels)
      .to(at::kDouble)
      .view({qkv.size(0), qkv.size(1), setup.heads, setup.width})
      .mean(2);
}

kernels::Matching match(const at::Tensor& qkv, DType dtype, const Setup& setup) {
  const int64_t batch = qkv.size(0), tokens = qkv.size(1);
  auto sides = at::zeros({tokens}, at::kByte);
  for (const int64_t token : setup.side_a) sides[token] = 1;
  const OnDevice input(qkv), in_side_a(sides);
  const OnDevice keep({batch, tokens - setup.r}, at::kInt), src({batch, setup.r}, at::kInt),
      dst({batch, setup.r}, at::kInt);
  kernels::cuda::MatchCall call;
  call.qkv = input.get();
  call.batch = int(batch);
  call.tokens = int(tokens);
  call.heads = int(setup.heads);
  call.head_dim = int(setup.width);
  call.dtype = dtype;
  call.r = int(setup.r);
  call.protected_tokens = int(setup.protected_tokens);
  call.in_side_a = setup.side_a.empty() ? nullptr : in_side_a.get<uint8_t>();
  call.keep = keep.get<int32_t>();
  call.src = src.get<int32_t>();
  call.dst = dst.get<int32_t>();
  const OnDevice plans(at::zeros({1}, at::kInt));
  call.done = plans.get<int>();
  kernels::cuda::match_bipartite(call, nullptr);
  if (test::is_hopper()) CHECK(plans.cpu().item<int>() == batch);
  return {keep.cpu().to(at::kLong), src.cpu().to(at::kLong), dst.cpu().to(at::kLong)};
}

bool same(const kernels::Matching& a, const kernels::Matching& b) {
  return at::equal(a.keep, b.keep) && at::equal(a.src, b.src) && at::equal(a.dst, b.dst);
}

/// The plan is the reference's but for scores that fp32 cannot tell apart: every src goes to a partner as good as its
/// best, in descending order of these, and none that stays has a better one.
void check_matching(const kernels::Matching& got, const at::Tensor& metric, const Setup& setup) {
  const auto expected = kernels::match_bipartite_reference(metric, setup.r, setup.protected_tokens, setup.side_a);
  if (same(got, expected)) return;
  REQUIRE(got.src.sizes() == expected.src.sizes());
  REQUIRE(got.dst.ge(0).all().item<bool>());
  REQUIRE(got.dst.lt(got.keep.size(1)).all().item<bool>());
  const auto everyone = std::get<0>(at::cat({got.keep, got.src}, 1).sort(1));
  REQUIRE(at::equal(everyone, at::arange(metric.size(1), at::kLong).expand_as(everyone)));
  const auto unit = metric / metric.norm(2, {-1}, true);
  const auto pick = [&](const at::Tensor& index) {
    return unit.gather(1, index.unsqueeze(-1).expand({index.size(0), index.size(1), metric.size(2)}));
  };
  const auto scores = [&](const kernels::Matching& plan) {
    return (pick(plan.src) * pick(plan.keep.gather(1, plan.dst))).sum(-1);
  };
  CHECK(test::max_difference(scores(got), scores(expected)) < 3e-6);
}

/// Keys whose means over heads have four entries of 1 or -1: their norms and products are exact in fp32, and many
/// scores equal. One head holds each entry, `heads` times as large.
at::Tensor exact_keys(int64_t batch, int64_t tokens, int64_t heads, int64_t width, uint64_t seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  auto keys = at::zeros({batch * tokens, heads, width});
  for (int64_t i = 0; i < batch * tokens; ++i) {
    const auto places = at::randperm(width, generator, at::kLong);
    const auto values = at::randint(0, 2, {4}, generator, at::TensorOptions()) * 2 - 1;
    for (int64_t j = 0; j < 4; ++j) keys[i][(i + j) % heads][places[j].item<int64_t>()] = values[j] * heads;
  }
  return keys.view({batch, tokens, heads, width});
}

}  // namespace

TEST_CASE("matching on the device equals the reference", "[gpu][match]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto tokens = GENERATE(2, 3, 8, 27, 66, 197);
  const auto width = GENERATE(32, 64, 72, 128);
  const auto protected_tokens = GENERATE(1, 2);
  const int64_t most = (tokens - protected_tokens) / 2;
  const auto r = GENERATE_COPY(int64_t{0}, int64_t{1}, most / 2, most);
  if (r > most) return;
  const Setup setup{3, width, r, protected_tokens};
  CAPTURE(int(dtype), tokens, width, protected_tokens, r);
  const auto qkv = with_keys(test::seeded({3, tokens, setup.heads, width}, uint64_t(tokens * 100 + width)), dtype);
  check_matching(match(qkv, dtype, setup), metric_of(qkv, setup), setup);
}

TEST_CASE("matching on the device takes batches that fill it and models of other sizes", "[gpu][match]") {
  PYRA_NEEDS_GPU();
  struct Model {
    int64_t batch, tokens, heads, width, r;
  };
  const auto model = GENERATE(Model{200, 197, 12, 64, 40}, Model{150, 69, 12, 64, 18}, Model{2, 197, 16, 64, 40},
                              Model{150, 197, 6, 64, 98}, Model{1, 577, 12, 64, 200}, Model{1, 1024, 4, 128, 300});
  CAPTURE(model.batch, model.tokens, model.heads, model.width, model.r);
  const Setup setup{model.heads, model.width, model.r, 1};
  const auto qkv = with_keys(test::seeded({model.batch, model.tokens, model.heads, model.width}, 4), DType::bf16);
  check_matching(match(qkv, DType::bf16, setup), metric_of(qkv, setup), setup);
}

TEST_CASE("matching on the device sends ties to the lowest index", "[gpu][match]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  SECTION("all tokens alike") {
    const auto qkv = with_keys(at::full({2, 9, 2, 16}, 0.5), dtype);
    const auto got = match(qkv, dtype, {2, 16, 3, 1});
    CHECK(at::equal(got.src, at::tensor({2, 4, 6}, at::kLong).expand({2, 3})));
    CHECK(at::equal(got.keep, at::tensor({0, 8, 1, 3, 5, 7}, at::kLong).expand({2, 6})));
    CHECK(at::equal(got.dst, at::full({2, 3}, 2, at::kLong)));
  }
  SECTION("many equal scores") {
    const auto protected_tokens = GENERATE(1, 2);
    const auto batch = GENERATE(2, 140);
    const auto tokens = GENERATE(66, 197);
    CAPTURE(int(dtype), protected_tokens, batch, tokens);
    const Setup setup{4, 64, 30, protected_tokens};
    const auto one = exact_keys(2, tokens, setup.heads, setup.width, 7);
    const auto qkv = with_keys(one.repeat({batch / 2, 1, 1, 1}), dtype);
    const auto metric = metric_of(qkv, setup);
    const auto expected = kernels::match_bipartite_reference(metric, setup.r, protected_tokens);
    CHECK(same(match(qkv, dtype, setup), expected));
  }
}

TEST_CASE("matching on the device takes sides as given", "[gpu][match]") {
  PYRA_NEEDS_GPU();
  const auto batch = GENERATE(1, 2, 140);
  const auto tokens = GENERATE(13, 101);
  Setup setup{3, 32, 4, 1, {0, 3, 4, 5, 9, 11}};
  for (int64_t token = 40; token < tokens; token += 1 + token % 3) setup.side_a.push_back(token);
  CAPTURE(batch, tokens);
  const auto qkv = with_keys(test::seeded({batch, tokens, setup.heads, setup.width}, 3), DType::bf16);
  const auto got = match(qkv, DType::bf16, setup);
  check_matching(got, metric_of(qkv, setup), setup);
  CHECK(got.src.ne(0).all().item<bool>());
}

TEST_CASE("matching on the device survives zeros and what is not a number", "[gpu][match]") {
  PYRA_NEEDS_GPU();
  const Setup setup{2, 16, 4, 1};
  auto keys = test::seeded({1, 9, setup.heads, setup.width}, 2);
  keys[0][2].zero_();
  keys[0][5].zero_();
  const auto qkv = with_keys(keys, DType::fp32);
  check_matching(match(qkv, DType::fp32, setup), metric_of(qkv, setup), setup);
  keys[0][4].fill_(std::numeric_limits<float>::quiet_NaN());
  const auto got = match(with_keys(keys, DType::fp32), DType::fp32, setup);
  CHECK(got.src[0][3].item<int64_t>() == 4);
  CHECK(got.dst.ge(0).all().item<bool>());
  CHECK(got.dst.lt(5).all().item<bool>());
}

TEST_CASE("an image's matching on the device depends on that image alone", "[gpu][match]") {
  PYRA_NEEDS_GPU();
  const auto tokens = GENERATE(27, 123, 197);
  const Setup setup{12, 64, 10, 1};
  CAPTURE(tokens);
  const auto qkv = with_keys(test::seeded({140, tokens, setup.heads, setup.width}, 11), DType::bf16);
  const auto all = match(qkv, DType::bf16, setup);
  CHECK(same(match(qkv, DType::bf16, setup), all));
  const auto turned = match(qkv.flip({0}), DType::bf16, setup);
  CHECK(same({turned.keep.flip({0}), turned.src.flip({0}), turned.dst.flip({0})}, all));
  // Other sizes of batch split an image's work otherwise.
  for (const int64_t batch : {1, 9, 20, 40}) {
    CAPTURE(batch);
    CHECK(same(match(qkv.narrow(0, 3, batch), DType::bf16, setup),
               {all.keep.narrow(0, 3, batch), all.src.narrow(0, 3, batch), all.dst.narrow(0, 3, batch)}));
  }
}

TEST_CASE("key_mean is the mean over heads", "[gpu][match]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto heads = GENERATE(1, 3, 12, 16, 25);
  const auto width = GENERATE(8, 64, 80);
  CAPTURE(int(dtype), heads, width);
  const Setup setup{heads, width, 0, 1};
  const auto qkv = with_keys(test::seeded({3, 7, heads, width}, 5), dtype);
  const OnDevice input(qkv), out({3, 7, width}, at::kFloat);
  kernels::cuda::key_mean(input.get(), dtype, 3, 7, heads, width, out.get<float>(), nullptr);
  CHECK(test::relative_difference(out.cpu(), metric_of(qkv, setup)) < 1e-6);
}

TEST_CASE("matching on the device refuses what does not fit", "[gpu][match]") {
  PYRA_NEEDS_GPU();
  const auto qkv = with_keys(test::seeded({1, 10, 2, 16}, 1), DType::fp32);
  CHECK_NOTHROW(match(qkv, DType::fp32, {2, 16, 4, 1}));
  CHECK_THROWS_AS(match(qkv, DType::fp32, {2, 16, 5, 1}), Error);
  CHECK_THROWS_AS(match(qkv, DType::fp32, {1, 20, 1, 1}), Error);
  kernels::cuda::MatchCall call;
  call.batch = 1;
  call.tokens = 10;
  call.heads = 2;
  call.head_dim = 16;
  call.r = -1;
  CHECK_THROWS_AS(kernels::cuda::match_bipartite(call, nullptr), Error);
  call.r = 1;
  CHECK_THROWS_AS(kernels::cuda::match_bipartite(call, nullptr), Error);  // no memory
  call.batch = 0;
  CHECK_NOTHROW(kernels::cuda::match_bipartite(call, nullptr));
  call.tokens = 1025;
  CHECK_THROWS_AS(kernels::cuda::match_bipartite(call, nullptr), Error);
}
