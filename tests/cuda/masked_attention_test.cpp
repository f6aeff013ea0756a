// Attention under a soft mask on the GPU, and its gradient, against the reference in double.
#include "kernels/cuda/masked_attention.h"

#include <functional>

#include "base/error.h"
#include "cuda/device.h"
#include "io/io_support.h"
#include "kernels/masked_attention.h"
#include "kernels/tensors.h"
#include "support.h"

using namespace pyra;
using namespace pyra::test;
using kernels::cuda::DType;
using kernels::cuda::MaskedAttentionBackwardCall;
using kernels::cuda::MaskedAttentionCall;

namespace {

struct Shape {
  int64_t batch, tokens, heads, head_dim;
};

/// Of whole and partial tiles and chunks, of one block a head and several.
const Shape kShapes[] = {{2, 197, 12, 64}, {3, 2, 4, 16},    {3, 3, 2, 32},   {20, 37, 8, 64}, {2, 33, 3, 32},
                         {2, 51, 2, 48},   {1, 257, 2, 80},  {2, 100, 3, 96}, {1, 31, 2, 112}, {2, 65, 2, 128},
                         {1, 1024, 2, 64}, {1, 600, 1, 128}, {5, 16, 5, 80},  {2, 129, 3, 16}};

enum class Keys { all, some, few, class_alone, soft };

struct Problem {
  at::Tensor qkv, sizes, mask, d_out;
  bool sized = false;
  [[nodiscard]] Problem image(int64_t i) const {
    return {qkv.narrow(0, i, 1), sizes.narrow(0, i, 1), mask.narrow(0, i, 1), d_out.narrow(0, i, 1), sized};
  }
};

at::Tensor mask_of(const Shape& shape, Keys keys) {
  const at::Tensor random = seeded({shape.batch, shape.tokens}, 4);
  at::Tensor mask = at::ones_like(random);
  if (keys == Keys::some) mask = (random > 0).to(at::kFloat);
  if (keys == Keys::few) mask = (random > 1.5).to(at::kFloat);
  if (keys == Keys::class_alone) mask.zero_();
  if (keys == Keys::soft) return random.abs();
  mask.select(1, 0).fill_(1);
  return mask;
}

Problem problem_of(const Shape& shape, DType dtype, Keys keys, bool sized, double scale = 1) {
  const int64_t channels = shape.heads * shape.head_dim;
  Problem problem;
  problem.qkv = seeded({shape.batch, shape.tokens, 3 * channels}, 1, scale).to(scalar_type(dtype));
  problem.sizes = at::ones({shape.batch, shape.tokens});
  if (sized) problem.sizes += seeded({shape.batch, shape.tokens}, 2).abs().mul(3).floor();
  problem.mask = mask_of(shape, keys);
  problem.d_out = seeded({shape.batch, shape.tokens, channels}, 3).to(scalar_type(dtype));
  problem.sized = sized;
  return problem;
}

struct Outcome {
  at::Tensor out, class_attention, d_qkv, d_mask;
};

/// Forward, and backward from what it gave.
Outcome on_device(const Problem& problem, const Shape& shape, DType dtype) {
  const int64_t batch = problem.qkv.size(0), channels = shape.heads * shape.head_dim;
  const std::vector<int64_t> queries{batch, shape.heads, shape.tokens};
  const at::ScalarType type = problem.qkv.scalar_type();
  const OnDevice qkv(problem.qkv), sizes(problem.sizes), mask(problem.mask), d_out(problem.d_out);
  const OnDevice out({batch, shape.tokens, channels}, type), d_qkv({batch, shape.tokens, 3 * channels}, type);
  const OnDevice class_rows(queries, at::kFloat), top(queries, at::kFloat), inverse(queries, at::kFloat),
      peak(queries, at::kInt), value_mean({batch, channels}, at::kFloat), delta(queries, at::kFloat),
      correction(queries, at::kFloat), d_mask_rows(queries, at::kFloat);
  MaskedAttentionCall forward;
  forward.qkv = qkv.get();
  forward.sizes = problem.sized ? sizes.get<float>() : nullptr;
  forward.mask = mask.get<float>();
  forward.out = out.get();
  forward.class_rows = class_rows.get<float>();
  forward.top = top.get<float>();
  forward.inverse = inverse.get<float>();
  forward.peak = peak.get<int32_t>();
  forward.value_mean = value_mean.get<float>();
  forward.batch = int(batch);
  forward.tokens = int(shape.tokens);
  forward.heads = int(shape.heads);
  forward.head_dim = int(shape.head_dim);
  forward.dtype = dtype;
  kernels::cuda::masked_attention(forward, nullptr);
  MaskedAttentionBackwardCall backward;
  backward.qkv = qkv.get();
  backward.sizes = forward.sizes;
  backward.mask = mask.get<float>();
  backward.out = out.get();
  backward.top = top.get<float>();
  backward.inverse = inverse.get<float>();
  backward.peak = peak.get<int32_t>();
  backward.value_mean = value_mean.get<float>();
  backward.d_out = d_out.get();
  backward.delta = delta.get<float>();
  backward.correction = correction.get<float>();
  backward.d_qkv = d_qkv.get();
  backward.d_mask_rows = d_mask_rows.get<float>();
  backward.batch = forward.batch;
  backward.tokens = forward.tokens;
  backward.heads = forward.heads;
  backward.head_dim = forward.head_dim;
  backward.dtype = dtype;
  kernels::cuda::masked_attention_backward(backward, nullptr);
  return {out.cpu(), class_rows.cpu().mean(1), d_qkv.cpu(), d_mask_rows.cpu().sum(1)};
}

Outcome expected(const Problem& problem, const Shape& shape) {
  const at::Tensor wide = problem.qkv.to(at::kDouble).set_requires_grad(true),
                   mask = problem.mask.to(at::kDouble).set_requires_grad(true);
  const auto result = kernels::masked_attention_reference(wide, shape.heads, problem.sizes.to(at::kDouble), mask);
  const auto gradients = gradients_of(result.out, problem.d_out.to(at::kDouble), {wide, mask});
  return {result.out.detach(), result.class_attention, gradients[0], gradients[1]};
}

/// Of the largest value. What is read and written rounds, and so does out, which backward starts from; nothing else.
double tolerance_of(DType dtype) {
  return dtype == DType::fp32 ? 2e-5 : dtype == DType::bf16 ? 1e-2 : 2e-3;
}

}  // namespace

TEST_CASE("masked attention and its gradient on the GPU equal their reference in double", "[gpu][masked_attention]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  const auto keys = GENERATE(Keys::all, Keys::some, Keys::few, Keys::class_alone, Keys::soft);
  const bool sized = GENERATE(false, true);
  CAPTURE(scalar_type(dtype), shape.batch, shape.tokens, shape.heads, shape.head_dim, int(keys), sized);
  const Problem problem = problem_of(shape, dtype, keys, sized);
  const Outcome found = on_device(problem, shape, dtype), wanted = expected(problem, shape);
  const double tolerance = tolerance_of(dtype);
  CHECK(relative_difference(found.out, wanted.out) < tolerance);
  CHECK(relative_difference(found.class_attention, wanted.class_attention) < 1e-5);
  CHECK(relative_difference(found.d_qkv, wanted.d_qkv) < tolerance);
  CHECK(relative_difference(found.d_mask, wanted.d_mask) < 5 * tolerance);
  if (shape.tokens < 8) return;  // of few tokens dQ and dK may be small beside dV
  for (int part = 0; part < 3; ++part) {
    CAPTURE(part);
    CHECK(relative_difference(found.d_qkv.chunk(3, -1)[part], wanted.d_qkv.chunk(3, -1)[part]) < 2 * tolerance);
  }
}

TEST_CASE("where all that a token sees is far below the key that is masked, eps and its gradient are felt on the GPU",
          "[gpu][masked_attention]") {
  PYRA_NEEDS_GPU();
  const Shape shape{2, 50, 3, 32};
  const Problem problem = problem_of(shape, DType::fp32, Keys::few, true, 4);
  const Outcome found = on_device(problem, shape, DType::fp32), wanted = expected(problem, shape);
  CHECK(relative_difference(found.out, wanted.out) < 1e-4);
  CHECK(relative_difference(found.d_qkv, wanted.d_qkv) < 1e-4);
  CHECK(relative_difference(found.d_mask, wanted.d_mask) < 1e-4);
}

TEST_CASE("masked attention on the GPU is bit-equal when repeated, and whoever an image's mates are",
          "[gpu][masked_attention]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto shape = GENERATE(Shape{5, 37, 4, 16}, Shape{7, 197, 12, 64}, Shape{3, 300, 2, 128});
  CAPTURE(scalar_type(dtype), shape.tokens);
  const Problem problem = problem_of(shape, dtype, Keys::some, true);
  const Outcome first = on_device(problem, shape, dtype), again = on_device(problem, shape, dtype);
  const auto check_equal = [](const Outcome& a, const Outcome& b) {
    CHECK(at::equal(a.out, b.out));
    CHECK(at::equal(a.class_attention, b.class_attention));
    CHECK(at::equal(a.d_qkv, b.d_qkv));
    CHECK(at::equal(a.d_mask, b.d_mask));
  };
  check_equal(first, again);
  for (const int64_t image : {int64_t{0}, shape.batch - 1})
    check_equal(on_device(problem.image(image), shape, dtype),
                {first.out.narrow(0, image, 1), first.class_attention.narrow(0, image, 1),
                 first.d_qkv.narrow(0, image, 1), first.d_mask.narrow(0, image, 1)});
}

TEST_CASE("masked attention on the GPU stands large logits", "[gpu][masked_attention]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16);
  const Shape shape{2, 150, 2, 64};
  const Outcome found = on_device(problem_of(shape, dtype, Keys::some, false, 100), shape, dtype);
  for (const at::Tensor& tensor : {found.out, found.class_attention, found.d_qkv, found.d_mask})
    CHECK(at::isfinite(tensor).all().item<bool>());
}

TEST_CASE("masked attention on the GPU refuses what it cannot do", "[gpu][masked_attention]") {
  PYRA_NEEDS_GPU();
  const OnDevice memory({1, 4, 96}, at::kFloat);
  const auto code_of = [&](const std::function<void(MaskedAttentionCall&)>& change) {
    MaskedAttentionCall call;
    call.qkv = memory.get();
    call.mask = memory.get<float>();
    call.out = memory.get();
    call.class_rows = call.top = call.inverse = call.value_mean = memory.get<float>();
    call.peak = memory.get<int32_t>();
    call.batch = 1;
    call.tokens = 4;
    call.heads = 2;
    call.head_dim = 16;
    call.dtype = DType::fp32;
    change(call);
    try {
      kernels::cuda::masked_attention(call, nullptr);
    } catch (const Error& error) {
      return error.code();
    }
    return ExitCode::ok;
  };
  using Call = MaskedAttentionCall;
  check_head_limits<Call>(code_of);
  CHECK(code_of([](Call& call) { call.dtype = static_cast<DType>(7); }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.qkv = static_cast<const char*>(call.qkv) + 4; }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.mask = nullptr; }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.out = nullptr; }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.peak = nullptr; }) == ExitCode::usage);
  MaskedAttentionBackwardCall backward;
  backward.batch = 1;
  backward.tokens = 4;
  backward.heads = 2;
  backward.head_dim = 16;
  check_error(ExitCode::usage, {"masked_attention_backward", "qkv is null"},
              [&] { kernels::cuda::masked_attention_backward(backward, nullptr); });
}
