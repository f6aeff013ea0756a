// LoRA's thin products inside the norms of training against the kernels that do them apart and against double.
#include <optional>

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/cuda/norm_train.h"
#include "kernels/linear.h"
#include "kernels/linear_path.h"
#include "kernels/tensors.h"

using namespace pyra;
using namespace pyra::test;
using namespace kernels::cuda;

namespace {

constexpr int64_t kBehind = 16;
const int64_t kWidths[] = {8, 48, 192, 200, 256, 384, 512, 768, 1024};

/// Results of `compute`, once rounded.
double limit(DType dtype) {
  return dtype == DType::fp32 ? 1e-5 : dtype == DType::bf16 ? 4e-3 : 6e-4;
}

struct Case {
  Case(int64_t count, int64_t width, DType type, double drop)
      : rows(count),
        channels(width),
        compute(type),
        p(drop),
        x(seeded({count, width}, 1, 2.0)),
        weight(seeded({width}, 2, 0.3) + 1),
        bias(seeded({width}, 3)),
        a(seeded({kNormRanks, width}, 4, 0.1)),
        d_y(seeded({count, width}, 5).to(scalar_type(type))),
        d_h(seeded({count, kNormRanks}, 6).to(scalar_type(type))),
        d_x(seeded({count, width}, 7)) {}
  int64_t rows, channels;
  DType compute;
  double p;
  at::Tensor x, weight, bias, a, d_y, d_h, d_x;

  [[nodiscard]] kernels::Dropout drop() const { return {p, 7, 3 * 192 + 5}; }
  [[nodiscard]] at::Tensor mask() const {
    if (p == 0) return at::ones({rows, channels}, at::kDouble);
    return kernels::dropout_multipliers(drop(), rows * channels).view({rows, channels}).to(at::kDouble);
  }
};

/// The case's tensors on the device, and the term's description.
struct Placed {
  explicit Placed(const Case& c)
      : step(at::full({2}, int64_t{3}, at::kLong)),
        a(c.a),
        weight(c.weight),
        bias(c.bias),
        copy({c.rows, kBehind}, scalar_type(c.compute)),
        dropout{.threshold = kernels::dropout_threshold(c.drop()),
                .scale = kernels::dropout_scale(c.drop()),
                .seed = 7,
                .step = step.get<uint64_t>(),
                .sites_per_step = 192,
                .site = 5} {}
  OnDevice step, a, weight, bias, copy;
  Dropout dropout;
  [[nodiscard]] NormLowRank term() const {
    return {.a = a.get<float>(), .padded = int(kBehind), .h_copy = copy.get(), .dropout = dropout};
  }
};

struct Forward {
  at::Tensor x, normalised, inverse, y, copy;
};

Forward forward(const Case& c, bool with_term) {
  const Placed on(c);
  const at::ScalarType type = scalar_type(c.compute);
  const OnDevice x(c.x), normalised({c.rows, c.channels}, type), inverse({c.rows}, at::kFloat),
      y({c.rows, c.channels + kBehind}, type);
  AddNormCall call;
  call.x = x.get<float>();
  call.rows = int(c.rows);
  call.channels = int(c.channels);
  call.weight = on.weight.get<float>();
  call.bias = on.bias.get<float>();
  call.normalised = normalised.get();
  call.inverse_deviation = inverse.get<float>();
  call.y = y.get();
  call.y_stride = c.channels + kBehind;
  if (with_term) call.low = on.term();
  call.compute = c.compute;
  add_norm(call, nullptr);
  return {x.cpu(), normalised.cpu(), inverse.cpu(), y.cpu(), on.copy.cpu()};
}

struct Backward {
  at::Tensor d_x, d_branch;
};

Backward backward(const Case& c, const Forward& f, bool with_term) {
  const Placed on(c);
  const at::ScalarType type = scalar_type(c.compute);
  const at::Tensor behind = at::zeros({c.rows, kBehind - kNormRanks}, type);
  const OnDevice d_y(at::cat({c.d_y.to(type), c.d_h, behind}, 1)), normalised(f.normalised), inverse(f.inverse),
      d_x(c.d_x), d_branch({c.rows, c.channels}, type);
  NormBackwardCall call;
  call.d_y = d_y.get();
  call.d_y_stride = c.channels + kBehind;
  call.normalised = normalised.get();
  call.inverse_deviation = inverse.get<float>();
  call.weight = on.weight.get<float>();
  call.d_x = d_x.get<float>();
  call.d_branch = d_branch.get();
  if (with_term) call.low = on.term();
  call.rows = int(c.rows);
  call.channels = int(c.channels);
  call.compute = c.compute;
  norm_backward(call, nullptr);
  return {d_x.cpu(), d_branch.cpu()};
}

/// The gradient of norm and stream in double, from what the forward pass left.
at::Tensor expected_d_x(const Case& c, const Forward& f) {
  const at::Tensor through = at::matmul(c.d_h.to(at::kDouble), c.a.to(at::kDouble)) * c.mask();
  const at::Tensor g = (c.d_y.to(at::kDouble) + through) * c.weight.to(at::kDouble);
  const at::Tensor normalised = f.normalised.to(at::kDouble);
  const at::Tensor inner = g - g.mean(1, true) - normalised * (g * normalised).mean(1, true);
  return c.d_x.to(at::kDouble) + inner * f.inverse.to(at::kDouble).unsqueeze(1);
}

}  // namespace

TEST_CASE("a cuda norm's LoRA term is that of its output", "[cuda][norm_train][lora][gpu]") {
  PYRA_NEEDS_GPU();
  const auto compute = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const int64_t channels = GENERATE(from_range(std::begin(kWidths), std::end(kWidths)));
  const int64_t rows = GENERATE(1, 5, 394);
  const double p = GENERATE(0.0, 0.1, 0.5);
  CAPTURE(int(compute), channels, rows, p);
  const Case c(rows, channels, compute, p);
  const Forward with = forward(c, true), without = forward(c, false);
  CHECK(at::equal(with.x, without.x));
  CHECK(at::equal(with.normalised, without.normalised));
  CHECK(at::equal(with.inverse, without.inverse));
  const at::Tensor y = with.y.slice(1, 0, channels).contiguous(), h = with.y.slice(1, channels).contiguous();
  CHECK(at::equal(y, without.y.slice(1, 0, channels).contiguous()));
  const at::Tensor expected = at::matmul(y.to(at::kDouble) * c.mask(), c.a.to(at::kDouble).t());
  CHECK(relative_difference(h.slice(1, 0, kNormRanks), expected) < limit(compute));
  CHECK((h.slice(1, kNormRanks) == 0).all().item<bool>());
  CHECK(at::equal(h, with.copy));
  CHECK(at::equal(forward(c, true).y, with.y));
}

TEST_CASE("a cuda norm's gradient takes what flows through A", "[cuda][norm_train][lora][gpu]") {
  PYRA_NEEDS_GPU();
  const auto compute = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const int64_t channels = GENERATE(from_range(std::begin(kWidths), std::end(kWidths)));
  const int64_t rows = GENERATE(1, 5, 394);
  const double p = GENERATE(0.0, 0.1, 0.5);
  CAPTURE(int(compute), channels, rows, p);
  Case c(rows, channels, compute, p);
  const Forward f = forward(c, true);
  const Backward got = backward(c, f, true);
  CHECK(relative_difference(got.d_x, expected_d_x(c, f)) < 1e-5);
  CHECK(at::equal(got.d_branch, got.d_x.to(scalar_type(compute))));
  CHECK(at::equal(backward(c, f, true).d_x, got.d_x));
  c.d_h = at::zeros_like(c.d_h);
  CHECK(at::equal(backward(c, f, true).d_x, backward(c, f, false).d_x));
}

TEST_CASE("a row's LoRA term in a cuda norm does not depend on the rows after it", "[cuda][norm_train][lora][gpu]") {
  PYRA_NEEDS_GPU();
  const auto compute = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const Case all(394, 768, compute, 0.1);
  const Forward f = forward(all, true);
  const Backward b = backward(all, f, true);
  Case some = all;
  some.rows = 101;
  for (at::Tensor* t : {&some.x, &some.d_y, &some.d_h, &some.d_x}) *t = t->slice(0, 0, some.rows).contiguous();
  const Forward own = forward(some, true);
  CHECK(at::equal(own.y, f.y.slice(0, 0, some.rows)));
  CHECK(at::equal(backward(some, own, true).d_x, b.d_x.slice(0, 0, some.rows)));
}

TEST_CASE("the cuda norms say which LoRA terms they take", "[cuda][norm_train][lora][gpu]") {
  PYRA_NEEDS_GPU();
  CHECK(norm_takes_rank(768, 8, 16));
  CHECK(norm_takes_rank(192, 8, 8));
  CHECK_FALSE(norm_takes_rank(768, 4, 16));
  CHECK_FALSE(norm_takes_rank(768, 16, 16));
  CHECK_FALSE(norm_takes_rank(1000, 8, 16));
  CHECK_FALSE(norm_takes_rank(1280, 8, 16));
  CHECK_FALSE(norm_takes_rank(768, 8, 40));
  const OnDevice memory({256}, at::kFloat);
  auto* floats = memory.get<float>();
  NormBackwardCall call{.d_y = floats,
                        .d_y_stride = 16,
                        .normalised = floats,
                        .inverse_deviation = floats,
                        .weight = floats,
                        .d_x = floats,
                        .low = {.a = floats, .padded = 16},
                        .rows = 1,
                        .channels = 16};
  CHECK_THROWS_WITH(norm_backward(call, nullptr), Catch::Contains("16 elements apart"));
  call.channels = 1280;
  call.d_y_stride = 1296;
  CHECK_THROWS_WITH(norm_backward(call, nullptr), Catch::Contains("16 columns behind 1280"));
}
