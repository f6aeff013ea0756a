#include "kernels/linear.h"

#include <optional>

#include "kernels/cpu_kernel.h"
#include "tensors.h"

using namespace pyra;
using namespace pyra::kernels;
using namespace pyra::test;

namespace {

struct Shape {
  int64_t rows, in, out;
};

/// Edges of the micro-kernels' tiles (12 rows, 32 columns, pairs along K) and the sizes of ViT-Ti and ViT-S.
const Shape kShapes[] = {{1, 16, 32},    {1, 192, 10}, {2, 17, 5},      {7, 64, 33},    {13, 192, 576}, {197, 192, 768},
                         {25, 768, 192}, {64, 65, 63}, {200, 384, 100}, {40, 192, 192}, {394, 33, 64}};

LinearWeights layer_of(const Shape& shape, uint64_t seed, bool bias = true) {
  return {seeded({shape.out, shape.in}, seed, 0.1), bias ? seeded({shape.out}, seed + 1) : at::Tensor()};
}

LowRankTerm low_rank_of(const Shape& shape, int64_t rank, double p, uint64_t seed) {
  return {seeded({rank, shape.in}, seed, 0.2), seeded({shape.out, rank}, seed + 1, 0.2), 0.75, {p, 11, 5}};
}

at::Tensor wide(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.detach().to(at::kDouble) : tensor;
}

at::Tensor leaf(const at::Tensor& tensor) {
  return tensor.clone().set_requires_grad(true);
}

/// The same layer and options in double, every floating tensor a leaf: what gradients are compared with.
struct WideCopy {
  at::Tensor x;
  LinearWeights layer;
  LinearOptions options;
  at::Tensor a, b;
};

WideCopy wide_copy(const at::Tensor& x, const LinearWeights& layer, const LinearOptions& options) {
  WideCopy copy{leaf(wide(x)), {leaf(wide(layer.weight())), leaf(wide(layer.bias()))}, options, {}, {}};
  copy.options.residual = wide(options.residual);
  copy.options.branch_scale = wide(options.branch_scale);
  if (copy.options.residual.defined()) copy.options.residual.set_requires_grad(true);
  if (copy.options.low_rank) {
    copy.a = copy.options.low_rank->a = leaf(wide(options.low_rank->a));
    copy.b = copy.options.low_rank->b = leaf(wide(options.low_rank->b));
  }
  return copy;
}

}  // namespace

TEST_CASE("linear equals its reference", "[kernels][linear]") {
  const auto compute = GENERATE(at::kFloat, at::kBFloat16);
  const auto shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  CAPTURE(compute, shape.rows, shape.in, shape.out);
  const at::Tensor x = seeded({shape.rows, shape.in}, 1).to(compute);
  const bool with_bias = shape.in % 2 == 0;
  const LinearWeights layer = layer_of(shape, 2, with_bias);
  LinearOptions options;
  const auto check = [&] {
    const at::Tensor y = linear(x, layer, options), expected = linear_reference(x, layer, options);
    CHECK(y.scalar_type() == expected.scalar_type());
    CHECK(relative_difference(y, expected) < tolerance(compute));
  };
  SECTION("plain") {
    check();
  }
  SECTION("GELU") {
    options.activation = Activation::gelu;
    check();
  }
  SECTION("residual") {
    options.residual = seeded({shape.rows, shape.out}, 3);
    check();
  }
  SECTION("residual and drop-path") {
    options.residual = seeded({shape.rows, shape.out}, 3);
    options.branch_scale = at::rand({shape.rows % 2 == 0 ? 2 : 1}) + 0.1;
    check();
  }
  SECTION("low rank") {
    options.low_rank = low_rank_of(shape, GENERATE(1, 4, 8, 12, 33), 0.0, 4);
    check();
  }
  SECTION("low rank, dropout, GELU, residual") {
    options.low_rank = low_rank_of(shape, 8, 0.3, 4);
    options.activation = Activation::gelu;
    options.residual = seeded({shape.rows, shape.out}, 3);
    check();
  }
}

TEST_CASE("linear's gradients equal those of its reference in double", "[kernels][linear]") {
  const auto shape =
      GENERATE(Shape{1, 16, 32}, Shape{26, 17, 5}, Shape{38, 192, 96}, Shape{200, 64, 192}, Shape{1000, 48, 40});
  const bool gelu = GENERATE(false, true), residual = GENERATE(false, true), low_rank = GENERATE(false, true);
  const double p = low_rank ? GENERATE(0.0, 0.25) : 0.0;
  CAPTURE(shape.rows, shape.in, shape.out, gelu, residual, low_rank, p);
  const at::Tensor x = leaf(seeded({shape.rows, shape.in}, 1));
  const LinearWeights layer(leaf(seeded({shape.out, shape.in}, 2, 0.1)), leaf(seeded({shape.out}, 3)));
  LinearOptions options;
  if (gelu) options.activation = Activation::gelu;
  if (residual) {
    options.residual = leaf(seeded({shape.rows, shape.out}, 4));
    options.branch_scale = at::full({1}, 0.7);
  }
  if (low_rank) {
    options.low_rank = low_rank_of(shape, 5, p, 6);
    options.low_rank->a = leaf(options.low_rank->a);
    options.low_rank->b = leaf(options.low_rank->b);
  }
  const WideCopy truth = wide_copy(x, layer, options);
  std::vector<at::Tensor> inputs{x, layer.weight(), layer.bias()};
  std::vector<at::Tensor> wide_inputs{truth.x, truth.layer.weight(), truth.layer.bias()};
  if (residual) inputs.push_back(options.residual), wide_inputs.push_back(truth.options.residual);
  if (low_rank) {
    inputs.insert(inputs.end(), {options.low_rank->a, options.low_rank->b});
    wide_inputs.insert(wide_inputs.end(), {truth.a, truth.b});
  }
  const at::Tensor cotangent = seeded({shape.rows, shape.out}, 9);
  const auto found = gradients_of(linear(x, layer, options), cotangent, inputs);
  const auto expected =
      gradients_of(linear_reference(truth.x, truth.layer, truth.options), cotangent.to(at::kDouble), wide_inputs);
  for (size_t i = 0; i < found.size(); ++i) {
    CAPTURE(i);
    CHECK(relative_difference(found[i], expected[i]) < 1e-5);
  }
}

TEST_CASE("linear's gradients in bf16 are near those in double", "[kernels][linear]") {
  const Shape shape{50, 64, 96};
  const at::Tensor x = seeded({shape.rows, shape.in}, 1).to(at::kBFloat16).set_requires_grad(true);
  const LinearWeights layer = layer_of(shape, 2);
  LinearOptions options;
  options.low_rank = low_rank_of(shape, 4, 0.1, 4);
  options.low_rank->a.set_requires_grad(true);
  options.low_rank->b.set_requires_grad(true);
  options.activation = GENERATE(Activation::none, Activation::gelu);
  if (GENERATE(false, true)) {
    options.residual = seeded({shape.rows, shape.out}, 7);
    options.branch_scale = at::tensor({0.5f, 2.0f});
  }
  const WideCopy truth = wide_copy(x, layer, options);
  const at::Tensor y = linear(x, layer, options);
  const at::Tensor cotangent = seeded({shape.rows, shape.out}, 9).to(y.scalar_type());
  const auto found = gradients_of(y, cotangent, {x, options.low_rank->a, options.low_rank->b});
  const auto expected = gradients_of(linear_reference(truth.x, truth.layer, truth.options), cotangent.to(at::kDouble),
                                     {truth.x, truth.a, truth.b});
  for (size_t i = 0; i < found.size(); ++i) CHECK(relative_difference(found[i], expected[i]) < 2e-2);
}

TEST_CASE("linear's gradient is the slope of its values", "[kernels][linear]") {
  const Shape shape{5, 24, 40};
  const LinearWeights layer = layer_of(shape, 2);
  LinearOptions options;
  options.activation = Activation::gelu;
  options.low_rank = low_rank_of(shape, 3, 0.2, 4);
  const at::Tensor x = leaf(seeded({shape.rows, shape.in}, 1)), direction = seeded({shape.rows, shape.in}, 8);
  const at::Tensor cotangent = seeded({shape.rows, shape.out}, 9);
  const auto value = [&](double step) {
    return (linear(x.detach() + direction * step, layer, options) * cotangent).to(at::kDouble).sum().item<double>();
  };
  const double step = 1e-2, slope = (value(step) - value(-step)) / (2 * step);
  const at::Tensor dx = gradients_of(linear(x, layer, options), cotangent, {x})[0];
  CHECK((dx * direction).sum().item<double>() == Approx(slope).epsilon(2e-3));
}

TEST_CASE("linear computes no gradient that nobody wants", "[kernels][linear]") {
  const Shape shape{30, 32, 64};
  const LinearWeights frozen = layer_of(shape, 2);
  const at::Tensor x = leaf(seeded({shape.rows, shape.in}, 1));
  const at::Tensor y = linear(x, frozen);
  y.sum().backward();
  CHECK(x.grad().defined());
  CHECK_FALSE(frozen.weight().grad().defined());
  CHECK_FALSE(frozen.bias().grad().defined());
  CHECK_FALSE(linear(x.detach(), frozen).requires_grad());
  const LinearWeights bias_only(seeded({shape.out, shape.in}, 2), leaf(seeded({shape.out}, 3)));
  linear(x.detach(), bias_only).sum().backward();
  CHECK(max_difference(bias_only.bias().grad(), at::full({shape.out}, double(shape.rows))) < 1e-4);
}

TEST_CASE("a row of linear does not depend on the others or on threads", "[kernels][linear]") {
  if (cpu_kernel() == CpuKernel::aten) return;  // ATen promises no such thing
  const auto compute = GENERATE(at::kFloat, at::kBFloat16);
  const Shape shape{61, 192, 100};
  const at::Tensor x = seeded({shape.rows, shape.in}, 1).to(compute), residual = seeded({shape.rows, shape.out}, 2);
  const LinearWeights layer = layer_of(shape, 3);
  LinearOptions options;
  options.activation = Activation::gelu;
  options.low_rank = low_rank_of(shape, 4, 0.0, 5);
  options.residual = residual;
  const at::Tensor together = linear(x, layer, options);
  with_threads(1, [&] { CHECK(at::equal(linear(x, layer, options), together)); });
  with_threads(3, [&] { CHECK(at::equal(linear(x, layer, options), together)); });
  for (const int64_t rows : {1, 5, 12, 30}) {
    const int64_t first = 61 - rows;
    options.residual = residual.narrow(0, first, rows).contiguous();
    const at::Tensor alone = linear(x.narrow(0, first, rows).contiguous(), layer, options);
    CHECK(at::equal(alone, together.narrow(0, first, rows)));
  }
}

TEST_CASE("linear inside a parallel region gives the same", "[kernels][linear]") {
  const Shape shape{64, 192, 192};
  const LinearWeights layer = layer_of(shape, 3);
  const at::Tensor x = seeded({shape.rows, shape.in}, 1), outside = linear(x, layer);
  std::vector<at::Tensor> inside(4);
  at::parallel_for(0, 4, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) inside[size_t(i)] = linear(x, layer);
  });
  for (const at::Tensor& y : inside) CHECK(max_difference(y, outside) < 1e-5);
}

TEST_CASE("GELU is exact over its whole range", "[kernels][linear]") {
  // The identity layer, so y = gelu(x): tails, zero and both signs.
  const int64_t channels = 32;
  const LinearWeights identity(at::eye(channels), at::Tensor());
  LinearOptions options;
  options.activation = Activation::gelu;
  const at::Tensor x = at::linspace(-12, 12, 64 * channels).view({64, channels}).contiguous();
  const at::Tensor expected = at::gelu(x.to(at::kDouble));
  CHECK(max_difference(linear(x, identity, options), expected) < 1e-6);
  const at::Tensor extreme = at::tensor({-1e30f, -100.0f, -0.0f, 0.0f, 100.0f, 1e30f}).repeat({16}).view({3, 32});
  const at::Tensor y = linear(extreme.contiguous(), identity, options);
  CHECK(max_difference(y, at::gelu(extreme.to(at::kDouble))) == 0);
}

TEST_CASE("changed masters count after invalidate", "[kernels][linear]") {
  const Shape shape{9, 32, 48};
  LinearWeights layer = layer_of(shape, 2);
  const at::Tensor x = seeded({shape.rows, shape.in}, 1);
  const at::Tensor before = linear(x, layer);
  layer.weight().mul_(2.0);
  layer.invalidate();
  const at::Tensor after = linear(x, layer);
  CHECK(relative_difference(after, linear_reference(x, layer)) < 1e-5);
  CHECK(max_difference(before, after) > 0.1);
}

TEST_CASE("linear refuses shapes that do not fit", "[kernels][linear]") {
  const LinearWeights layer = layer_of({4, 8, 6}, 1);
  CHECK_THROWS_WITH(linear(at::zeros({4, 9}), layer), Catch::Contains("[4, 9]") && Catch::Contains("[rows,8]"));
  CHECK_THROWS_WITH(linear(at::zeros({4, 8}, at::kDouble), layer), Catch::Contains("fp32 or bf16"));
  LinearOptions options;
  options.residual = at::zeros({4, 5});
  CHECK_THROWS_WITH(linear(at::zeros({4, 8}), layer, options), Catch::Contains("residual"));
  options = {};
  options.branch_scale = at::ones({3});
  CHECK_THROWS_WITH(linear(at::zeros({4, 8}), layer, options), Catch::Contains("branch_scale"));
  options = {};
  options.low_rank = LowRankTerm{at::zeros({2, 8}), at::zeros({6, 3})};
  CHECK_THROWS_WITH(linear(at::zeros({4, 8}), layer, options), Catch::Contains("low_rank.b"));
}

TEST_CASE("dropout keeps its expectation, repeats itself and scales gradients by its mask", "[kernels][linear]") {
  const double p = GENERATE(0.1, 0.5);
  const Dropout options{p, 7, 3};
  const at::Tensor x = leaf(at::ones({1000, 201}));
  const at::Tensor y = dropout(x, options);
  const double deviation = std::sqrt(p / (1 - p) / double(x.numel()));
  CHECK(y.mean().item<double>() == Approx(1.0).margin(5 * deviation));
  CHECK((y == 0).to(at::kDouble).mean().item<double>() == Approx(p).margin(5 * deviation));
  CHECK(at::equal(y, dropout(x, options)));
  CHECK_FALSE(at::equal(y, dropout(x, {p, 7, 4})));
  CHECK_FALSE(at::equal(y, dropout(x, {p, 8, 3})));
  with_threads(1, [&] { CHECK(at::equal(y, dropout(x, options))); });
  CHECK(at::equal(gradients_of(y, at::ones_like(y), {x})[0], y.detach()));
  CHECK(dropout(x, {}).is_same(x));
}

TEST_CASE("a dropout mask is the documented function of Philox", "[kernels][linear]") {
  const at::Tensor multipliers = dropout_multipliers({0.25, 7, 3}, 1003);
  // Element e: half-word e % 8 of block e / 8 against p * 65536, as linear.h says.
  CHECK(multipliers.numel() == 1003);
  const at::Tensor longer = dropout_multipliers({0.25, 7, 3}, 5000);
  CHECK(at::equal(longer.narrow(0, 0, 1003), multipliers));
  const at::Tensor kept = multipliers.masked_select(multipliers > 0);
  CHECK(max_difference(kept, at::full_like(kept, 4.0 / 3.0)) < 1e-6);
}

TEST_CASE("linear's other paths pass the same tests", "[kernels][linear][rerun]") {
  for (const std::string& kernel : other_kernels()) {
    const RunResult result = rerun_with_kernel(kernel, "[linear]");
    INFO(kernel << "\n" << result.out << result.err);
    CHECK(result.exit_code == 0);
  }
}

TEST_CASE("PYRA_CPU_KERNEL names a path or is refused", "[kernels][linear][rerun]") {
  const RunResult result = rerun_with_kernel("sse2", "[linear]");
  CHECK(result.exit_code != 0);
  CHECK_THAT(result.out, Catch::Contains("expected aten, avx2, avx512 or avx512-bf16"));
}
