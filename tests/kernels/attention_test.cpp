#include "kernels/attention.h"

#include "kernels/cpu_kernel.h"
#include "tensors.h"

using namespace pyra;
using namespace pyra::kernels;
using namespace pyra::test;

namespace {

struct Shape {
  int64_t batch, tokens, heads, head_dim;
};

const Shape kShapes[] = {{2, 197, 3, 64}, {3, 2, 4, 16},  {1, 1, 1, 16},  {2, 257, 2, 32}, {2, 20, 3, 64},
                         {1, 33, 2, 80},  {2, 17, 3, 10}, {1, 50, 1, 13}, {1, 600, 1, 64}, {1, 31, 2, 128}};

at::Tensor qkv_of(const Shape& shape, uint64_t seed, double scale = 1.0) {
  return seeded({shape.batch, shape.tokens, 3 * shape.heads * shape.head_dim}, seed, scale);
}

at::Tensor sizes_of(const Shape& shape, uint64_t seed) {
  return seeded({shape.batch, shape.tokens}, seed).abs().mul(3).floor().add(1);
}

}  // namespace

TEST_CASE("attention equals its reference in double", "[kernels][attention]") {
  const auto dtype = GENERATE(at::kFloat, at::kBFloat16);
  const auto shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  const bool sized = GENERATE(false, true);
  CAPTURE(dtype, shape.batch, shape.tokens, shape.heads, shape.head_dim, sized);
  const at::Tensor qkv = qkv_of(shape, 1).to(dtype);
  AttentionOptions options{sized ? sizes_of(shape, 2) : at::Tensor(), true, true};
  const AttentionOutput found = attention(qkv, shape.heads, options);
  const AttentionOutput expected = attention_reference(qkv.to(at::kDouble), shape.heads, options);
  CHECK(found.out.scalar_type() == dtype);
  CHECK(relative_difference(found.out, expected.out) < tolerance(dtype));
  CHECK(relative_difference(found.key_mean, expected.key_mean) < 1e-5);
  CHECK(relative_difference(found.class_attention, expected.class_attention) < tolerance(dtype));
  CHECK(max_difference(found.class_attention.sum(-1), at::ones({shape.batch})) < 1e-5);
  const AttentionOutput bare = attention(qkv, shape.heads, {options.sizes});
  CHECK_FALSE(bare.key_mean.defined());
  CHECK_FALSE(bare.class_attention.defined());
  CHECK(at::equal(bare.out, found.out));
}

TEST_CASE("attention's gradient equals that of its reference in double", "[kernels][attention]") {
  const auto dtype = GENERATE(at::kFloat, at::kBFloat16);
  const auto shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  const bool sized = GENERATE(false, true);
  CAPTURE(dtype, shape.batch, shape.tokens, shape.heads, shape.head_dim, sized);
  const at::Tensor qkv = qkv_of(shape, 1).to(dtype).set_requires_grad(true);
  const at::Tensor wide = qkv.detach().to(at::kDouble).set_requires_grad(true);
  const AttentionOptions options{sized ? sizes_of(shape, 2) : at::Tensor()};
  const at::Tensor cotangent = seeded({shape.batch, shape.tokens, shape.heads * shape.head_dim}, 3).to(dtype);
  const auto found = gradients_of(attention(qkv, shape.heads, options).out, cotangent, {qkv})[0];
  const auto expected =
      gradients_of(attention_reference(wide, shape.heads, options).out, cotangent.to(at::kDouble), {wide})[0];
  CHECK(found.scalar_type() == dtype);
  CHECK(relative_difference(found, expected) < (dtype == at::kFloat ? 1e-5 : 2e-2));
}

TEST_CASE("attention's gradient is the slope of its values", "[kernels][attention]") {
  const Shape shape{2, 13, 2, 16};
  const at::Tensor qkv = qkv_of(shape, 1).set_requires_grad(true), direction = qkv_of(shape, 5);
  const AttentionOptions options{sizes_of(shape, 2)};
  const at::Tensor cotangent = seeded({2, 13, 32}, 3);
  const auto value = [&](double step) {
    const at::Tensor out = attention(qkv.detach() + direction * step, shape.heads, options).out;
    return (out * cotangent).to(at::kDouble).sum().item<double>();
  };
  const double step = 1e-2, slope = (value(step) - value(-step)) / (2 * step);
  const auto gradient = gradients_of(attention(qkv, shape.heads, options).out, cotangent, {qkv})[0];
  CHECK((gradient * direction).sum().item<double>() == Approx(slope).epsilon(2e-3));
}

TEST_CASE("an image's attention does not depend on its batch mates or on threads", "[kernels][attention]") {
  if (cpu_kernel() == CpuKernel::aten) return;  // ATen promises no such thing
  const auto dtype = GENERATE(at::kFloat, at::kBFloat16);
  const Shape shape{5, 45, 3, 64};
  const at::Tensor qkv = qkv_of(shape, 1).to(dtype), sizes = sizes_of(shape, 2);
  const AttentionOutput together = attention(qkv, shape.heads, {sizes, true, true});
  with_threads(3, [&] { CHECK(at::equal(attention(qkv, shape.heads, {sizes}).out, together.out)); });
  for (int64_t image = 0; image < shape.batch; ++image) {
    const AttentionOutput alone = attention(qkv.narrow(0, image, 1).contiguous(), shape.heads,
                                            {sizes.narrow(0, image, 1).contiguous(), true, true});
    CHECK(at::equal(alone.out, together.out.narrow(0, image, 1)));
    CHECK(at::equal(alone.key_mean, together.key_mean.narrow(0, image, 1)));
    CHECK(at::equal(alone.class_attention, together.class_attention.narrow(0, image, 1)));
  }
}

TEST_CASE("attention stands large logits", "[kernels][attention]") {
  const auto dtype = GENERATE(at::kFloat, at::kBFloat16);
  const Shape shape{1, 40, 2, 64};
  const double scale = GENERATE(30.0, 1e4);
  const at::Tensor qkv = qkv_of(shape, 1, scale).to(dtype).set_requires_grad(true);
  const at::Tensor out = attention(qkv, shape.heads, {}).out;
  CHECK(at::isfinite(out).all().item<bool>());
  const auto gradient = gradients_of(out, at::ones_like(out), {qkv})[0];
  CHECK(at::isfinite(gradient).all().item<bool>());
  if (scale > 1000) return;  // one key takes all: the values of two roundings need not agree
  CHECK(relative_difference(out, attention_reference(qkv.detach().to(at::kDouble), shape.heads, {}).out) < 2e-2);
}

TEST_CASE("a token of size two counts as two equal tokens", "[kernels][attention]") {
  const Shape shape{1, 6, 1, 16};
  const at::Tensor qkv = qkv_of(shape, 1);
  const at::Tensor twice = at::cat({qkv, qkv.narrow(1, 5, 1)}, 1);
  const at::Tensor sizes = at::tensor({1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 2.0f}).view({1, 6});
  const at::Tensor merged = attention(qkv, 1, {sizes}).out, full = attention(twice, 1).out;
  CHECK(max_difference(merged, full.narrow(1, 0, 6)) < 1e-5);
}

TEST_CASE("attention refuses shapes that do not fit", "[kernels][attention]") {
  CHECK_THROWS_WITH(attention(at::zeros({1, 4, 50}), 4), Catch::Contains("4 heads"));
  CHECK_THROWS_WITH(attention(at::zeros({4, 48}), 4), Catch::Contains("[B,N,3C]"));
  CHECK_THROWS_WITH(attention(at::zeros({1, 4, 48}), 4, {at::ones({1, 5})}), Catch::Contains("sizes"));
}

TEST_CASE("attention's other paths pass the same tests", "[kernels][attention][rerun]") {
  for (const std::string& kernel : other_kernels()) {
    const RunResult result = rerun_with_kernel(kernel, "[attention]");
    INFO(kernel << "\n" << result.out << result.err);
    CHECK(result.exit_code == 0);
  }
}
