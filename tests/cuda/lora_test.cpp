#include "kernels/cuda/lora.h"

#include <algorithm>
#include <optional>

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/linear.h"
#include "kernels/linear_path.h"
#include "kernels/tensors.h"

using namespace pyra;
using namespace pyra::test;
using kernels::cuda::DType;

namespace {

const DType kTypes[] = {DType::fp32, DType::bf16, DType::fp16};

struct Sizes {
  int64_t rows, channels, rank;
};
const Sizes kShapes[] = {{1, 8, 1},      {1, 768, 8},    {5, 192, 3},     {17, 200, 8},   {63, 384, 17},
                         {64, 64, 64},   {197, 192, 16}, {591, 768, 8},   {130, 1024, 4}, {1031, 384, 8},
                         {3500, 200, 5}, {70, 72, 100},  {6001, 192, 33}, {33, 4096, 8}};

struct Drop {
  double p;
  uint64_t seed, step, sites_per_step, site;
  [[nodiscard]] kernels::Dropout cpu() const { return {p, seed, step * sites_per_step + site}; }
};
const Drop kDrops[] = {{0, 0, 0, 0, 0}, {0.1, 7, 3, 192, 5}, {0.5, (1ull << 40) + 3, (1ull << 34) + 1, 192, 191}};

/// Results of `compute`, once rounded.
double limit(DType dtype) {
  return dtype == DType::fp32 ? 1e-5 : dtype == DType::bf16 ? 4e-3 : 6e-4;
}

int64_t padded(int64_t rank) {
  return (rank + 15) / 16 * 16;
}

/// Values that `dtype` holds, in double.
at::Tensor held(at::IntArrayRef shape, uint64_t seed, DType dtype, double scale = 1.0) {
  return seeded(shape, seed, scale).to(scalar_type(dtype)).to(at::kDouble);
}

/// A step's dropout, with the step on the device.
struct DeviceDrop {
  OnDevice step;
  kernels::cuda::Dropout value;
  explicit DeviceDrop(const Drop& drop) : step(at::full({2}, int64_t(drop.step), at::kLong)) {
    value.threshold = kernels::dropout_threshold(drop.cpu());
    value.scale = kernels::dropout_scale(drop.cpu());
    value.seed = drop.seed;
    value.step = step.get<uint64_t>();
    value.sites_per_step = drop.sites_per_step;
    value.site = drop.site;
  }
};

at::Tensor mask(const Drop& drop, int64_t rows, int64_t channels) {
  if (drop.p == 0) return at::ones({rows, channels}, at::kDouble);
  return kernels::dropout_multipliers(drop.cpu(), rows * channels).view({rows, channels}).to(at::kDouble);
}

/// `left` and behind it `right`, as `dtype`.
at::Tensor beside(const at::Tensor& left, const at::Tensor& right, DType dtype) {
  return at::cat({left, right}, 1).to(scalar_type(dtype));
}

at::Tensor columns(const at::Tensor& of, int64_t begin, int64_t end) {
  return of.slice(1, begin, end);
}

struct Down {
  at::Tensor buffer, copy;
};

/// x stands in front of what becomes h.
Down run_down(const at::Tensor& x, const at::Tensor& a, const Drop& drop, DType dtype) {
  const int64_t rows = x.size(0), in = x.size(1), rank = a.size(0), behind = padded(rank);
  const OnDevice buffer(
      beside(x, at::full({rows, behind}, std::numeric_limits<double>::quiet_NaN(), at::kDouble), dtype));
  const OnDevice copy({rows, behind}, scalar_type(dtype)), weights(a.to(at::kFloat));
  const DeviceDrop dropout(drop);
  kernels::cuda::LoraDownCall call;
  call.x = buffer.get();
  call.x_stride = call.h_stride = in + behind;
  call.a = weights.get<float>();
  call.h = buffer.get<char>() + size_t(in) * kernels::cuda::size_of(dtype);
  call.h_copy = copy.get();
  call.padded = int(behind);
  call.rows = int(rows);
  call.in = int(in);
  call.rank = int(rank);
  call.dropout = dropout.value;
  call.compute = dtype;
  kernels::cuda::lora_down(call, nullptr);
  return {buffer.cpu(), copy.cpu()};
}

struct Backward {
  at::Tensor x, a, d_h, d_x;  ///< d_x undefined: not wanted
  at::Tensor norm_weight, norm_bias;
};

struct Gradients {
  at::Tensor a, d_x, behind;
  [[nodiscard]] bool equals(const Gradients& o) const {
    return at::equal(a, o.a) && d_x.defined() == o.d_x.defined() && (!d_x.defined() || at::equal(d_x, o.d_x));
  }
};

/// The chunks' sums, in their order.
at::Tensor add_up(const at::Tensor& partial) {
  at::Tensor sum = partial[0].clone();
  for (int64_t k = 1; k < partial.size(0); ++k) sum += partial[k];
  return sum;
}

Gradients run_backward(const Backward& b, const Drop& drop, DType dtype) {
  const int64_t rows = b.x.size(0), in = b.x.size(1), rank = b.a.size(0), behind = padded(rank), stride = in + behind;
  const at::Tensor base = b.d_x.defined() ? b.d_x : at::zeros({rows, in}, at::kDouble);
  const at::Tensor low = at::cat({b.d_h, at::zeros({rows, behind - rank}, at::kDouble)}, 1);
  const OnDevice x(b.x.to(scalar_type(dtype))), gradient(beside(base, low, dtype)), a(b.a.to(at::kFloat));
  const int chunks = kernels::cuda::lora_chunks(int(rows));
  const OnDevice partial({chunks, rank, in}, at::kFloat);
  std::optional<OnDevice> norm_weight, norm_bias;
  const DeviceDrop dropout(drop);
  kernels::cuda::LoraBackwardCall call;
  call.x = x.get();
  call.x_stride = in;
  if (b.norm_weight.defined()) {
    call.norm_weight = norm_weight.emplace(b.norm_weight.to(at::kFloat)).get<float>();
    call.norm_bias = norm_bias.emplace(b.norm_bias.to(at::kFloat)).get<float>();
  }
  call.d_h = gradient.get<char>() + size_t(in) * kernels::cuda::size_of(dtype);
  call.d_h_stride = call.d_x_stride = stride;
  call.a = a.get<float>();
  call.d_x = b.d_x.defined() ? gradient.get() : nullptr;
  call.a_partial = partial.get<float>();
  call.rows = int(rows);
  call.in = int(in);
  call.rank = int(rank);
  call.dropout = dropout.value;
  call.compute = dtype;
  kernels::cuda::lora_backward(call, nullptr);
  const at::Tensor after = gradient.cpu();
  return {add_up(partial.cpu()), b.d_x.defined() ? columns(after, 0, in).contiguous() : at::Tensor(),
          columns(after, in, stride).contiguous()};
}

Backward make_backward(const Sizes& s, DType dtype, bool norm) {
  Backward b;
  b.x = held({s.rows, s.channels}, 1, dtype);
  b.a = held({s.rank, s.channels}, 2, DType::fp32, 0.1);
  b.d_h = held({s.rows, s.rank}, 3, dtype);
  b.d_x = held({s.rows, s.channels}, 4, dtype);
  if (norm) {
    b.norm_weight = held({s.channels}, 5, DType::fp32, 0.3) + 1;
    b.norm_bias = held({s.channels}, 6, DType::fp32, 0.3);
  }
  return b;
}

}  // namespace

TEST_CASE("cuda LoRA's thin product equals the reference", "[cuda][lora][gpu]") {
  PYRA_NEEDS_GPU();
  const DType dtype = GENERATE(from_range(std::begin(kTypes), std::end(kTypes)));
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  const auto& drop = GENERATE(from_range(std::begin(kDrops), std::end(kDrops)));
  CAPTURE(int(dtype), shape.rows, shape.channels, shape.rank, drop.p);
  const at::Tensor x = held({shape.rows, shape.channels}, 1, dtype);
  const at::Tensor a = held({shape.rank, shape.channels}, 2, DType::fp32, 0.1);
  const Down got = run_down(x, a, drop, dtype);
  const int64_t in = shape.channels, stride = in + padded(shape.rank);
  const at::Tensor h = columns(got.buffer, in, stride).contiguous();
  const at::Tensor expected = at::matmul(x * mask(drop, shape.rows, in), a.t());
  CHECK(relative_difference(columns(h, 0, shape.rank), expected) < limit(dtype));
  CHECK(at::equal(columns(h, shape.rank, h.size(1)), at::zeros_like(columns(h, shape.rank, h.size(1)))));
  CHECK(at::equal(h, got.copy));
  CHECK(at::equal(columns(got.buffer, 0, in).to(at::kDouble), x));
  const Down again = run_down(x, a, drop, dtype);
  CHECK(at::equal(h, columns(again.buffer, in, stride)));
}

TEST_CASE("cuda dropout drops what the CPU drops", "[cuda][lora][gpu]") {
  PYRA_NEEDS_GPU();
  const DType dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto& drop = GENERATE(Drop{0.1, 7, 3, 192, 5}, Drop{0.5, ~0ull, 1ull << 40, 48, 47}, Drop{0.00001, 1, 0, 4, 0},
                              Drop{0.99999, 1, 1, 4, 3});
  CAPTURE(int(dtype), drop.p);
  // A is the identity, so h is the mask itself.
  const int64_t rows = 777, in = 64;
  const at::Tensor x = at::ones({rows, in}, at::kDouble);
  const Down got = run_down(x, at::eye(in, at::kDouble), drop, dtype);
  const at::Tensor expected = mask(drop, rows, in).to(scalar_type(dtype));
  CHECK(at::equal(columns(got.buffer, in, 2 * in), expected));
}

TEST_CASE("cuda LoRA's way back equals autograd", "[cuda][lora][gpu]") {
  PYRA_NEEDS_GPU();
  const DType dtype = GENERATE(from_range(std::begin(kTypes), std::end(kTypes)));
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  const auto& drop = GENERATE(from_range(std::begin(kDrops), std::end(kDrops)));
  const bool norm = GENERATE(false, true);
  CAPTURE(int(dtype), shape.rows, shape.channels, shape.rank, drop.p, norm);
  const Backward b = make_backward(shape, dtype, norm);
  at::Tensor input = norm ? (b.x * b.norm_weight + b.norm_bias).to(scalar_type(dtype)).to(at::kDouble) : b.x.clone();
  at::Tensor a = b.a.clone();
  input.set_requires_grad(true);
  a.set_requires_grad(true);
  const auto expected =
      gradients_of(at::matmul(input * mask(drop, shape.rows, shape.channels), a.t()), b.d_h, {input, a});

  const Gradients got = run_backward(b, drop, dtype);
  // Sums of exact products, but for inputs that a norm's rounding has put on the other side.
  CHECK(relative_difference(got.a, expected[1]) < (norm && dtype != DType::fp32 ? 2e-3 : 1e-5));
  // Passes of a wide term round d_x each.
  CHECK(relative_difference(got.d_x, b.d_x + expected[0]) < limit(dtype) * double(1 + shape.rank / 16));
  CHECK(at::equal(columns(got.behind, 0, shape.rank).to(at::kDouble), b.d_h));
  CHECK(got.equals(run_backward(b, drop, dtype)));

  Backward alone = b;
  alone.d_x = at::Tensor();
  CHECK(at::equal(run_backward(alone, drop, dtype).a, got.a));
}

TEST_CASE("a row's cuda LoRA term does not depend on the rows after it", "[cuda][lora][gpu]") {
  PYRA_NEEDS_GPU();
  const DType dtype = GENERATE(from_range(std::begin(kTypes), std::end(kTypes)));
  CAPTURE(int(dtype));
  const Backward all = make_backward({3001, 384, 8}, dtype, false);
  const Gradients got = run_backward(all, kDrops[1], dtype);
  const at::Tensor h = run_down(all.x, all.a, kDrops[1], dtype).copy;
  for (const int64_t rows : {1, 100, 2049}) {
    CAPTURE(rows);
    Backward some = all;
    for (at::Tensor* t : {&some.x, &some.d_h, &some.d_x}) *t = t->slice(0, 0, rows).contiguous();
    CHECK(at::equal(run_backward(some, kDrops[1], dtype).d_x, got.d_x.slice(0, 0, rows)));
    CHECK(at::equal(run_down(some.x, some.a, kDrops[1], dtype).copy, h.slice(0, 0, rows)));
  }
}

TEST_CASE("cuda LoRA's B gradient equals the reference", "[cuda][lora][gpu]") {
  PYRA_NEEDS_GPU();
  const DType dtype = GENERATE(from_range(std::begin(kTypes), std::end(kTypes)));
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  const bool part = GENERATE(false, true);  // of a layer's outputs, the last third
  CAPTURE(int(dtype), shape.rows, shape.channels, shape.rank, part);
  const int64_t out = shape.channels, all = part ? 3 * out : out, begin = all - out, behind = padded(shape.rank);
  const at::Tensor dy = held({shape.rows, all}, 1, dtype);
  const at::Tensor h =
      at::cat({held({shape.rows, shape.rank}, 2, dtype), at::zeros({shape.rows, behind - shape.rank}, at::kDouble)}, 1);
  const OnDevice device_dy(dy.to(scalar_type(dtype))), device_h(h.to(scalar_type(dtype)));
  const auto run = [&] {
    const int chunks = kernels::cuda::lora_chunks(int(shape.rows));
    const OnDevice partial(at::zeros({chunks, all, shape.rank}, at::kFloat));
    kernels::cuda::ThinGradientCall call;
    call.dy = device_dy.get<char>() + size_t(begin) * kernels::cuda::size_of(dtype);
    call.dy_stride = all;
    call.h = device_h.get();
    call.h_stride = behind;
    call.scale = 0.375f;
    call.b_partial = partial.get<float>() + begin * shape.rank;
    call.chunk_stride = all * shape.rank;
    call.rows = int(shape.rows);
    call.out = int(out);
    call.rank = int(shape.rank);
    call.compute = dtype;
    kernels::cuda::thin_gradient(call, nullptr);
    return add_up(partial.cpu());
  };
  const at::Tensor got = run();
  const at::Tensor expected = at::matmul(columns(dy, begin, all).t(), columns(h, 0, shape.rank)) * 0.375;
  CHECK(relative_difference(got.slice(0, begin, all), expected) < 1e-5);
  CHECK(at::equal(got.slice(0, 0, begin), at::zeros({begin, shape.rank}, at::kFloat)));
  CHECK(at::equal(got, run()));
}

TEST_CASE("chunks of rows cover them and stay few", "[cuda][lora]") {
  for (const int rows : {1, 63, 64, 65, 2000, 4096, 4097, 25216, 50432, 1000000}) {
    const int chunks = kernels::cuda::lora_chunks(rows);
    CHECK(chunks >= 1);
    CHECK(chunks <= std::min(rows, 64));
  }
}

TEST_CASE("cuda LoRA refuses calls it cannot serve", "[cuda][lora][gpu]") {
  PYRA_NEEDS_GPU();
  const OnDevice memory({64, 64}, at::kFloat);
  kernels::cuda::LoraDownCall call;
  call.x = call.h = memory.get();
  call.a = memory.get<float>();
  call.x_stride = call.h_stride = 64;
  call.padded = 16;
  call.rows = 4;
  call.in = 32;
  call.rank = 8;
  const auto attempt = [&] { kernels::cuda::lora_down(call, nullptr); };
  SECTION("null") {
    call.x = nullptr;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("x is null"));
  }
  SECTION("channels") {
    call.in = 20;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("20 channels"));
  }
  SECTION("a rank without room") {
    call.rank = 17;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("16 columns for rank 17"));
  }
  SECTION("rows that overlap") {
    call.x_stride = 24;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("24 elements apart"));
  }
}
