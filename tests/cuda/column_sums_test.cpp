// Sums over rows: exact ones of small integers, which show that each row counts once, and a norm's gradients.
#include "kernels/cuda/column_sums.h"

#include <optional>

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/tensors.h"

using namespace pyra;
using namespace pyra::test;
using namespace kernels::cuda;

namespace {

/// Whole numbers from -8 to 8: all types hold them and their products, and fp32 their sums, exactly.
at::Tensor integers(at::IntArrayRef shape, uint64_t seed, DType dtype) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randint(-8, 9, shape, generator, at::kFloat).to(scalar_type(dtype));
}

/// The partial sums of columns begin .. begin + channels - 1 of d, whose rows are as wide as d.
at::Tensor partials(const at::Tensor& d, int64_t begin, int64_t channels, DType dtype, const at::Tensor& factor = {}) {
  const int rows = int(d.size(0));
  const OnDevice in(d), out({column_sum_chunks(rows), channels}, at::kFloat);  // NaN: all of it must be written
  std::optional<OnDevice> by;
  if (factor.defined()) by.emplace(factor);
  column_sums({.d = in.get<char>() + size_t(begin) * size_of(dtype),
               .d_stride = d.size(1),
               .dtype = dtype,
               .factor = by ? by->get() : nullptr,
               .rows = rows,
               .channels = int(channels),
               .partial = out.get<float>()},
              nullptr);
  return out.cpu();
}

}  // namespace

TEST_CASE("cuda column_sums count each row once", "[cuda][column_sums][gpu]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  // Around what fills a chunk's 64 rows, and the 64 chunks.
  const int64_t rows = GENERATE(1, 2, 15, 17, 63, 64, 65, 394, 4032, 4033, 4097, 6001);
  const int64_t channels = GENERATE(8, 200, 768);
  const int64_t gap = GENERATE(0, 24);
  CAPTURE(int(dtype), rows, channels, gap);
  at::Tensor d = integers({rows, channels + gap}, 1, dtype);
  d.slice(1, channels).fill_(std::nan(""));  // another layer's columns
  const at::Tensor factor = integers({rows, channels}, 2, dtype);
  const at::Tensor wide = d.slice(1, 0, channels).to(at::kFloat);
  CHECK(at::equal(partials(d, 0, channels, dtype).sum(0), wide.sum(0)));
  CHECK(at::equal(partials(d, 0, channels, dtype, factor).sum(0), (wide * factor.to(at::kFloat)).sum(0)));
}

TEST_CASE("cuda column_sums of many columns, in a fixed order", "[cuda][column_sums][gpu]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const int64_t channels = GENERATE(2304, 4104);
  CAPTURE(int(dtype), channels);
  const at::Tensor d = seeded({1970, channels}, 1).to(scalar_type(dtype));
  const at::Tensor sums = partials(d, 0, channels, dtype);
  // The inputs are what the type holds and the sums are fp32, so one limit for all types.
  CHECK(relative_difference(sums.sum(0), d.to(at::kDouble).sum(0)) < 1e-5);
  CHECK(at::equal(partials(d, 0, channels, dtype), sums));
  // A column's sums are its own, whoever else is summed and wherever it stands.
  for (const int64_t begin : {int64_t(0), int64_t(8), int64_t(1000), channels - 200})
    CHECK(at::equal(partials(d, begin, 200, dtype), sums.narrow(1, begin, 200)));
}

TEST_CASE("cuda column_sums are a norm's gradients", "[cuda][column_sums][gpu]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const int64_t rows = GENERATE(3, 197, 2 * 197), channels = GENERATE(192, 384, 768);
  CAPTURE(int(dtype), rows, channels);
  const at::ScalarType type = scalar_type(dtype);
  const at::Tensor x = seeded({rows, channels}, 1).to(at::kDouble), d = seeded({rows, channels}, 2).to(type);
  const at::Tensor weight = at::ones({channels}, at::kDouble).requires_grad_(),
                   bias = at::zeros({channels}, at::kDouble).requires_grad_();
  const auto expected =
      gradients_of(at::layer_norm(x, {channels}, weight, bias, 1e-6), d.to(at::kDouble), {weight, bias});
  const at::Tensor normalised = at::layer_norm(x, {channels}, {}, {}, 1e-6).to(type);
  // The normalised rows are kept rounded, each to 8 or 11 bits.
  const double limit = dtype == DType::fp32 ? 1e-5 : dtype == DType::bf16 ? 5e-3 : 1e-3;
  CHECK(relative_difference(partials(d, 0, channels, dtype, normalised).sum(0), expected[0]) < limit);
  CHECK(relative_difference(partials(d, 0, channels, dtype).sum(0), expected[1]) < 1e-5);
}

TEST_CASE("cuda column_sums keep a NaN in its column", "[cuda][column_sums][gpu]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  at::Tensor d = integers({500, 384}, 1, dtype);
  d[333][77] = std::nan("");
  const at::Tensor nans = partials(d, 0, 384, dtype).sum(0).isnan();
  CHECK(nans.sum().item<int64_t>() == 1);
  CHECK(nans[77].item<bool>());
}

TEST_CASE("the chunks of cuda column_sums follow from the rows", "[cuda][column_sums][gpu]") {
  PYRA_NEEDS_GPU();
  for (int rows = 1, before = 1; rows < 60'000; rows += 7) {
    const int chunks = column_sum_chunks(rows);
    REQUIRE(chunks >= before);
    REQUIRE(chunks <= rows);
    before = chunks;
  }
}

TEST_CASE("cuda column_sums refuse what they cannot read", "[cuda][column_sums][gpu]") {
  PYRA_NEEDS_GPU();
  const OnDevice memory({256}, at::kFloat);
  auto* floats = memory.get<float>();
  ColumnSumsCall call{.d = floats, .d_stride = 16, .dtype = DType::bf16, .rows = 2, .channels = 16, .partial = floats};
  const auto attempt = [&] { column_sums(call, nullptr); };
  SECTION("rows") {
    call.rows = 0;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("0 rows"));
  }
  SECTION("channels") {
    call.channels = 12;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("12 channels"));
  }
  SECTION("rows that overlap") {
    call.d_stride = 8;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("8 apart"));
  }
  SECTION("rows off their alignment") {
    call.d_stride = 20;  // 40 bytes
    CHECK_THROWS_WITH(attempt(), Catch::Contains("20 apart"));
  }
  SECTION("null") {
    call.partial = nullptr;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("partial is null"));
  }
  SECTION("alignment") {
    call.factor = floats + 1;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("aligned"));
  }
}
