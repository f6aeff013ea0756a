#include "kernels/cuda/rank.h"

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/rank.h"
#include "kernels/tensors.h"

using namespace pyra;
using kernels::cuda::DType;
using test::OnDevice;

namespace {

struct Counts {
  int64_t tokens, prune, merge, protected_tokens;
};

struct Inputs {
  at::Tensor x, class_rows;  // [B,N,C] of a dtype, [B,H,N] fp32
};

/// Class rows in steps that fp32 adds without rounding: the ranking of their means is exact.
Inputs random_inputs(int64_t batch, int64_t tokens, int64_t heads, int64_t channels, DType dtype, uint64_t seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const auto steps = at::randint(0, 1 << 12, {batch, heads, tokens}, generator, at::TensorOptions());
  return {test::seeded({batch, tokens, channels}, seed + 1).to(test::scalar_type(dtype)), steps / float(1 << 12)};
}

kernels::Ranking rank(const Inputs& in, DType dtype, const Counts& counts) {
  const int64_t batch = in.x.size(0), tail = counts.prune - counts.merge;
  const OnDevice x(in.x), rows(in.class_rows);
  const OnDevice keep({batch, counts.merge}, at::kInt), src({batch, tail}, at::kInt), dst({batch, tail}, at::kInt),
      cosine({batch, tail}, at::kFloat);
  kernels::cuda::RankCall call;
  call.tokens = x.get();
  call.class_rows = rows.get<float>();
  call.batch = int(batch);
  call.token_count = int(in.x.size(1));
  call.heads = int(in.class_rows.size(1));
  call.channels = int(in.x.size(2));
  call.dtype = dtype;
  call.prune = int(counts.prune);
  call.merge = int(counts.merge);
  call.protected_tokens = int(counts.protected_tokens);
  call.keep = keep.get<int32_t>();
  call.src = src.get<int32_t>();
  call.dst = dst.get<int32_t>();
  call.cosine = cosine.get<float>();
  kernels::cuda::rank_tokens(call, nullptr);
  return {keep.cpu().to(at::kLong), src.cpu().to(at::kLong), dst.cpu().to(at::kLong), cosine.cpu()};
}

kernels::Ranking reference(const Inputs& in, const Counts& counts) {
  return kernels::rank_tokens_reference(in.x.to(at::kDouble), in.class_rows.sum(1).to(at::kDouble), counts.prune,
                                        counts.merge, counts.protected_tokens);
}

/// Equal to the reference but for partners whose cosines fp32 cannot tell apart.
void check_ranking(const kernels::Ranking& got, const Inputs& in, const Counts& counts) {
  const auto expected = reference(in, counts);
  CHECK(at::equal(got.keep, expected.keep));
  CHECK(at::equal(got.src, expected.src));
  REQUIRE(got.dst.sizes() == expected.dst.sizes());
  REQUIRE(got.dst.ge(counts.protected_tokens).all().item<bool>());
  REQUIRE(got.dst.lt(counts.merge).all().item<bool>());
  CHECK(test::max_difference(got.cosine, expected.cosine) < 5e-6);
  const auto x = in.x.to(at::kDouble), unit = x / x.norm(2, {-1}, true);
  const auto pick = [&](const at::Tensor& index) {
    return unit.gather(1, index.unsqueeze(-1).expand({index.size(0), index.size(1), x.size(2)}));
  };
  const auto chosen = (pick(got.src) * pick(got.keep.gather(1, got.dst))).sum(-1);
  CHECK(test::max_difference(chosen, expected.cosine) < 5e-6);
}

bool same(const kernels::Ranking& a, const kernels::Ranking& b) {
  return at::equal(a.keep, b.keep) && at::equal(a.src, b.src) && at::equal(a.dst, b.dst) &&
         at::equal(a.cosine, b.cosine);
}

}  // namespace

TEST_CASE("ranking on the device equals the reference", "[gpu][rank]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto protected_tokens = GENERATE(1, 2);
  auto counts = GENERATE(Counts{197, 180, 150, 1}, Counts{197, 197, 100, 1}, Counts{65, 59, 51, 1},
                         Counts{65, 40, 40, 1}, Counts{9, 9, 3, 1}, Counts{5, 4, 3, 1}, Counts{4, 4, 4, 1});
  counts.protected_tokens = protected_tokens;
  const auto channels = GENERATE(8, 192, 200, 768);
  const auto batch = GENERATE(1, 3);
  CAPTURE(int(dtype), counts.tokens, counts.prune, counts.merge, protected_tokens, channels, batch);
  const Inputs in = random_inputs(batch, counts.tokens, 3, channels, dtype, uint64_t(counts.tokens + channels));
  check_ranking(rank(in, dtype, counts), in, counts);
}

TEST_CASE("ranking on the device takes batches that fill it and many tokens", "[gpu][rank]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16);
  const auto tail = GENERATE(5, 16, 30, 40);
  CAPTURE(int(dtype), tail);
  const Counts counts{197, 150 + tail, 150, 1};
  const Inputs in = random_inputs(140, counts.tokens, 12, 384, dtype, 5);
  check_ranking(rank(in, dtype, counts), in, counts);
  const Counts many{1024, 1000, 700, 1};
  const Inputs large = random_inputs(1, many.tokens, 4, 128, dtype, 6);
  check_ranking(rank(large, dtype, many), large, many);
}

TEST_CASE("ranking on the device sends ties to the lowest index", "[gpu][rank]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto batch = GENERATE(2, 140);
  const Inputs in{at::full({batch, 8, 16}, 0.5).to(test::scalar_type(dtype)), at::full({batch, 3, 8}, 0.1)};
  const auto got = rank(in, dtype, {8, 7, 4, 1});
  CHECK(at::equal(got.keep, at::arange(4, at::kLong).expand({batch, 4})));
  CHECK(at::equal(got.src, at::arange(4, 7, at::kLong).expand({batch, 3})));
  CHECK(at::equal(got.dst, at::ones({batch, 3}, at::kLong)));
}

TEST_CASE("the first of equally alike tokens is the partner on the device, wherever it stands", "[gpu][rank]") {
  PYRA_NEEDS_GPU();
  const auto first = GENERATE(1, 8, 9, 33, 64, 100, 148);
  const auto batch = GENERATE(1, 140);
  CAPTURE(first, batch);
  const Counts counts{160, 160, 150, 1};
  Inputs in = random_inputs(batch, counts.tokens, 2, 96, DType::fp32, 8);
  in.class_rows = at::arange(160, 0, -1, at::kFloat).expand({batch, 2, 160}).contiguous();  // ranked as they stand
  for (int64_t i = first; i < 150; i += 3) in.x.select(1, i).copy_(in.x.select(1, 155) * 2);
  const auto got = rank(in, DType::fp32, counts);
  CHECK(got.dst.select(1, 5).eq(first).all().item<bool>());
}

TEST_CASE("ranking on the device survives zeros and what is not a number", "[gpu][rank]") {
  PYRA_NEEDS_GPU();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Inputs in = random_inputs(1, 9, 2, 16, DType::fp32, 1);
  in.class_rows[0][1][3] = nan;
  const auto last = rank(in, DType::fp32, {9, 9, 8, 1});
  CHECK(last.src[0][0].item<int64_t>() == 3);
  in.class_rows = at::arange(9, 0, -1, at::kFloat).expand({1, 2, 9}).contiguous();
  in.x[0][7].zero_();
  in.x[0][2].fill_(nan);
  const auto got = rank(in, DType::fp32, {9, 9, 6, 1});
  CHECK(got.cosine[0][1].item<float>() == 0);  // token 7: alike to none, so to the first that has a cosine
  CHECK(got.dst[0][1].item<int64_t>() == 1);
  CHECK(got.dst.ne(2).all().item<bool>());
  CHECK(at::isfinite(got.cosine).all().item<bool>());
}

TEST_CASE("an image's ranking on the device depends on that image alone", "[gpu][rank]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16);
  const auto tail = GENERATE(6, 30, 70);
  CAPTURE(int(dtype), tail);
  const Counts counts{197, 110 + tail, 110, 1};
  const Inputs in = random_inputs(140, counts.tokens, 3, 200, dtype, 3);
  const auto all = rank(in, dtype, counts);
  CHECK(same(rank(in, dtype, counts), all));
  const auto turned = rank({in.x.flip({0}), in.class_rows.flip({0})}, dtype, counts);
  CHECK(same({turned.keep.flip({0}), turned.src.flip({0}), turned.dst.flip({0}), turned.cosine.flip({0})}, all));
  // Other sizes of batch split an image's work otherwise.
  for (const int64_t batch : {1, 4, 9, 30, 70}) {
    CAPTURE(batch);
    const auto part = [&](const at::Tensor& whole) { return whole.narrow(0, 2, batch); };
    CHECK(same(rank({part(in.x), part(in.class_rows)}, dtype, counts),
               {part(all.keep), part(all.src), part(all.dst), part(all.cosine)}));
  }
}

TEST_CASE("class_attention_mean is the mean over heads", "[gpu][rank]") {
  PYRA_NEEDS_GPU();
  const auto heads = GENERATE(1, 3, 12);
  const auto tokens = GENERATE(1, 197, 300);
  CAPTURE(heads, tokens);
  const auto rows = test::seeded({3, heads, tokens}, 4).abs();
  const OnDevice in(rows), out({3, tokens}, at::kFloat);
  kernels::cuda::class_attention_mean(in.get<float>(), 3, heads, tokens, out.get<float>(), nullptr);
  CHECK(test::relative_difference(out.cpu(), rows.to(at::kDouble).mean(1)) < 1e-6);
}

TEST_CASE("ranking on the device refuses counts that do not fit", "[gpu][rank]") {
  PYRA_NEEDS_GPU();
  const Inputs in = random_inputs(1, 9, 2, 8, DType::fp32, 1);
  CHECK_NOTHROW(rank(in, DType::fp32, {9, 9, 2, 1}));
  CHECK_THROWS_AS(rank(in, DType::fp32, {9, 10, 2, 1}), Error);
  CHECK_THROWS_AS(rank(in, DType::fp32, {9, 3, 1, 1}), Error);
  kernels::cuda::RankCall call;
  call.batch = 1;
  call.token_count = 9;
  call.heads = 2;
  call.channels = 8;
  call.prune = 3;
  call.merge = 4;
  CHECK_THROWS_AS(kernels::cuda::rank_tokens(call, nullptr), Error);
  call.prune = 9;
  CHECK_THROWS_AS(kernels::cuda::rank_tokens(call, nullptr), Error);  // no memory
  call.batch = 0;
  CHECK_NOTHROW(kernels::cuda::rank_tokens(call, nullptr));
  call.channels = 12;
  CHECK_THROWS_AS(kernels::cuda::rank_tokens(call, nullptr), Error);
}
