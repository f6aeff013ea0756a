#include "kernels/masked_attention.h"

#include "base/error.h"
#include "kernels/attention.h"
#include "tensors.h"

using namespace pyra;
using namespace pyra::kernels;
using namespace pyra::test;

namespace {

struct Shape {
  int64_t batch, tokens, heads, head_dim;
};

const Shape kShapes[] = {{2, 50, 3, 64}, {3, 17, 2, 10}, {1, 1, 1, 8}, {1, 197, 3, 64}};

at::Tensor qkv_of(const Shape& shape, uint64_t seed) {
  return seeded({shape.batch, shape.tokens, 3 * shape.heads * shape.head_dim}, seed);
}
at::Tensor sizes_of(const Shape& shape) {
  return seeded({shape.batch, shape.tokens}, 2).abs().add(1);
}
/// The first two thirds of the tokens are there.
at::Tensor mask_of(const Shape& shape) {
  return (at::arange(shape.tokens) * 3 < 2 * shape.tokens).to(at::kFloat).expand({shape.batch, -1}).contiguous();
}

}  // namespace

TEST_CASE("masked attention equals its reference in double", "[kernels][masked_attention]") {
  const auto dtype = GENERATE(at::kFloat, at::kBFloat16);
  const auto shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  CAPTURE(dtype, shape.batch, shape.tokens, shape.heads, shape.head_dim);
  const at::Tensor qkv = qkv_of(shape, 1).to(dtype), sizes = sizes_of(shape), mask = mask_of(shape);
  const auto found = masked_attention(qkv, shape.heads, sizes, mask);
  const auto expected =
      masked_attention_reference(qkv.to(at::kDouble), shape.heads, sizes.to(at::kDouble), mask.to(at::kDouble));
  CHECK(found.out.scalar_type() == dtype);
  CHECK(relative_difference(found.out, expected.out) < tolerance(dtype));
  CHECK(relative_difference(found.class_attention, expected.class_attention) < tolerance(dtype));
}

TEST_CASE("masked attention's gradients equal those of its reference in double", "[kernels][masked_attention]") {
  const auto dtype = GENERATE(at::kFloat, at::kBFloat16);
  const auto shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  CAPTURE(dtype, shape.batch, shape.tokens, shape.heads, shape.head_dim);
  const at::Tensor sizes = sizes_of(shape);
  const at::Tensor qkv = qkv_of(shape, 1).to(dtype).set_requires_grad(true);
  const at::Tensor mask = mask_of(shape).set_requires_grad(true);
  const at::Tensor wide_qkv = qkv.detach().to(at::kDouble).set_requires_grad(true);
  const at::Tensor wide_mask = mask.detach().to(at::kDouble).set_requires_grad(true);
  const at::Tensor cotangent = seeded({shape.batch, shape.tokens, shape.heads * shape.head_dim}, 3).to(dtype);
  const auto found = gradients_of(masked_attention(qkv, shape.heads, sizes, mask).out, cotangent, {qkv, mask});
  const auto expected =
      gradients_of(masked_attention_reference(wide_qkv, shape.heads, sizes.to(at::kDouble), wide_mask).out,
                   cotangent.to(at::kDouble), {wide_qkv, wide_mask});
  CHECK(relative_difference(found[0], expected[0]) < tolerance(dtype));
  CHECK(max_difference(found[1], expected[1]) < tolerance(dtype) * (1 + expected[1].abs().max().item<double>()));
}

TEST_CASE("the reference's gradients are finite differences", "[kernels][masked_attention]") {
  const Shape shape{1, 5, 2, 4};
  const at::Tensor sizes = sizes_of(shape).to(at::kDouble);
  at::Tensor qkv = qkv_of(shape, 1).to(at::kDouble).set_requires_grad(true);
  // Between zero and one too: there the mask is a weight.
  at::Tensor mask = at::tensor({1.0, 0.6, 1.0, 0.0, 0.3}, at::kDouble).view({1, 5}).set_requires_grad(true);
  const at::Tensor cotangent = seeded({1, 5, 8}, 3).to(at::kDouble);
  const auto gradients = gradients_of(masked_attention_reference(qkv, 2, sizes, mask).out, cotangent, {qkv, mask});
  const at::NoGradGuard no_gradients;
  const auto value = [&] { return (masked_attention_reference(qkv, 2, sizes, mask).out * cotangent).sum(); };
  for (const auto& [input, gradient] : {std::pair(qkv, gradients[0]), std::pair(mask, gradients[1])}) {
    at::Tensor flat = input.detach().view({-1});
    for (int64_t i = 0; i < flat.numel(); ++i) {
      const double at = flat[i].item<double>(), step = 1e-5;
      flat[i] = at + step;
      const double above = value().item<double>();
      flat[i] = at - step;
      const double below = value().item<double>();
      flat[i] = at;
      CAPTURE(i);
      CHECK(std::abs((above - below) / (2 * step) - gradient.view({-1})[i].item<double>()) < 1e-7);
    }
  }
}

TEST_CASE("with nothing masked out it is attention", "[kernels][masked_attention]") {
  const Shape shape{2, 50, 3, 64};
  const at::Tensor qkv = qkv_of(shape, 1), sizes = sizes_of(shape);
  const auto found = masked_attention(qkv, shape.heads, sizes, at::ones({shape.batch, shape.tokens}));
  const auto expected = attention(qkv, shape.heads, {.sizes = sizes, .class_attention = true});
  CHECK(relative_difference(found.out, expected.out) < 1e-5);
  CHECK(relative_difference(found.class_attention, expected.class_attention) < 1e-5);
}

TEST_CASE("a token that is masked out is seen by itself alone", "[kernels][masked_attention]") {
  const Shape shape{1, 17, 2, 10};
  const at::Tensor sizes = sizes_of(shape);
  at::Tensor mask = at::ones({1, shape.tokens});
  mask[0][5] = 0;
  const at::Tensor qkv = qkv_of(shape, 1);
  at::Tensor other = qkv.clone();
  // The values alone: a key takes part in the row's maximum, masked or not.
  other.narrow(2, 2 * 20, 20).select(1, 5).add_(10);
  const at::Tensor a = masked_attention(qkv, 2, sizes, mask).out, b = masked_attention(other, 2, sizes, mask).out;
  const at::Tensor changed = (a - b).abs().amax(-1)[0];
  for (int64_t i = 0; i < shape.tokens; ++i) {
    CAPTURE(i);
    if (i == 5)
      CHECK(changed[i].item<float>() > 0.1f);
    else
      CHECK(changed[i].item<float>() < 1e-5f);  // eps / N of it
  }
}

TEST_CASE("masked attention depends neither on the batch nor on the threads", "[kernels][masked_attention]") {
  const Shape shape{3, 50, 3, 16};
  const at::Tensor sizes = sizes_of(shape), cotangent = seeded({3, 50, 48}, 3);
  const auto run = [&](int64_t first, int64_t count) {
    const at::Tensor qkv = qkv_of(shape, 1).narrow(0, first, count).contiguous().set_requires_grad(true);
    const at::Tensor mask = mask_of(shape).narrow(0, first, count).contiguous().set_requires_grad(true);
    const auto result = masked_attention(qkv, 3, sizes.narrow(0, first, count), mask);
    auto all = gradients_of(result.out, cotangent.narrow(0, first, count), {qkv, mask});
    all.push_back(result.out.detach());
    all.push_back(result.class_attention);
    return all;
  };
  const auto whole = run(0, 3), last = run(2, 1);
  for (size_t i = 0; i < whole.size(); ++i) CHECK(at::equal(whole[i].narrow(0, 2, 1), last[i]));
  with_threads(1, [&] {
    const auto serial = run(0, 3);
    for (size_t i = 0; i < whole.size(); ++i) CHECK(at::equal(whole[i], serial[i]));
  });
}

TEST_CASE("masked attention refuses what does not fit", "[kernels][masked_attention]") {
  const at::Tensor qkv = at::zeros({2, 5, 24}), rows = at::ones({2, 5});
  CHECK_THROWS_AS(masked_attention(qkv, 3, rows, at::ones({2, 4})), Error);
  CHECK_THROWS_AS(masked_attention(qkv, 3, rows.to(at::kDouble), rows), Error);
  CHECK_THROWS_AS(masked_attention(qkv, 5, rows, rows), Error);
  CHECK_THROWS_AS(masked_attention(qkv.transpose(0, 1), 2, rows, rows), Error);
}
