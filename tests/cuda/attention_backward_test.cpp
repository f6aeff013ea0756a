#include <cmath>
#include <functional>

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/attention.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_backward.h"
#include "kernels/tensors.h"
#include "support.h"

using namespace pyra;
using namespace pyra::test;
using kernels::cuda::AttentionBackwardCall;
using kernels::cuda::AttentionCall;
using kernels::cuda::DType;

namespace {

struct Shape {
  int64_t batch, tokens, heads, head_dim;
};

/// Of whole and partial tiles, of several heads a block and several blocks a head, of one chunk of columns and many.
const Shape kShapes[] = {{2, 197, 12, 64}, {3, 157, 3, 64}, {2, 1, 2, 64},   {3, 2, 4, 16},    {40, 8, 12, 64},
                         {30, 27, 6, 64},  {20, 37, 8, 64}, {2, 33, 3, 32},  {2, 51, 2, 48},   {1, 257, 2, 80},
                         {2, 100, 3, 96},  {1, 31, 2, 112}, {2, 65, 2, 128}, {1, 1024, 2, 64}, {1, 600, 1, 128},
                         {5, 16, 5, 80},   {4, 5, 3, 128},  {3, 45, 4, 16}};
/// Of more heads than are on a GPU at once, for every shape of Hopper's kernels that goes from head to head, and
/// others.
const Shape kMates[] = {{30, 27, 12, 64}, {37, 197, 12, 64}, {25, 157, 12, 64}, {50, 100, 12, 64},
                        {60, 64, 12, 64}, {70, 8, 12, 64},   {5, 45, 3, 80},    {9, 300, 2, 64}};

/// Shared memory that makes a Hopper GPU stand for one without its way of attention.
constexpr const char* kNotHopper = "200000";

struct Problem {
  at::Tensor qkv, sizes, d_out;
  [[nodiscard]] Problem image(int64_t i) const {
    return {qkv.narrow(0, i, 1), sizes.defined() ? sizes.narrow(0, i, 1) : sizes, d_out.narrow(0, i, 1)};
  }
};

Problem problem_of(const Shape& shape, DType dtype, bool sized, double scale = 1.0) {
  const int64_t channels = shape.heads * shape.head_dim;
  Problem problem;
  problem.qkv = seeded({shape.batch, shape.tokens, 3 * channels}, 1, scale).to(scalar_type(dtype));
  if (sized) problem.sizes = seeded({shape.batch, shape.tokens}, 2).abs().mul(3).floor().add(1);
  problem.d_out = seeded({shape.batch, shape.tokens, channels}, 3).to(scalar_type(dtype));
  return problem;
}

struct Outcome {
  at::Tensor out, log_sum, d_qkv;
};

/// Forward, and backward from what it gave.
Outcome on_device(const Problem& problem, const Shape& shape, DType dtype) {
  const int64_t batch = problem.qkv.size(0), channels = shape.heads * shape.head_dim;
  const at::ScalarType type = problem.qkv.scalar_type();
  const OnDevice qkv(problem.qkv), sizes(problem.sizes.defined() ? problem.sizes : at::zeros({1}));
  const OnDevice d_out(problem.d_out), out({batch, shape.tokens, channels}, type);
  const OnDevice log_sum({batch, shape.heads, shape.tokens}, at::kFloat);
  const OnDevice d_qkv({batch, shape.tokens, 3 * channels}, type);
  AttentionCall forward;
  forward.qkv = qkv.get();
  forward.sizes = problem.sizes.defined() ? sizes.get<float>() : nullptr;
  forward.out = out.get();
  forward.log_sum = log_sum.get<float>();
  forward.batch = int(batch);
  forward.tokens = int(shape.tokens);
  forward.heads = int(shape.heads);
  forward.head_dim = int(shape.head_dim);
  forward.dtype = dtype;
  kernels::cuda::attention(forward, nullptr);
  AttentionBackwardCall backward;
  backward.qkv = qkv.get();
  backward.sizes = forward.sizes;
  backward.out = out.get();
  backward.log_sum = log_sum.get<float>();
  backward.d_out = d_out.get();
  backward.d_qkv = d_qkv.get();
  backward.batch = forward.batch;
  backward.tokens = forward.tokens;
  backward.heads = forward.heads;
  backward.head_dim = forward.head_dim;
  backward.dtype = dtype;
  kernels::cuda::attention_backward(backward, nullptr);
  return {out.cpu(), log_sum.cpu(), d_qkv.cpu()};
}

/// The forward's result alone, without log_sum.
at::Tensor forward_only(const Problem& problem, const Shape& shape, DType dtype) {
  const OnDevice qkv(problem.qkv), sizes(problem.sizes.defined() ? problem.sizes : at::zeros({1}));
  const OnDevice out(problem.d_out.sizes(), problem.qkv.scalar_type());
  AttentionCall call;
  call.qkv = qkv.get();
  call.sizes = problem.sizes.defined() ? sizes.get<float>() : nullptr;
  call.out = out.get();
  call.batch = int(problem.qkv.size(0));
  call.tokens = int(shape.tokens);
  call.heads = int(shape.heads);
  call.head_dim = int(shape.head_dim);
  call.dtype = dtype;
  kernels::cuda::attention(call, nullptr);
  return out.cpu();
}

at::Tensor expected_gradient(const Problem& problem, const Shape& shape) {
  const at::Tensor wide = problem.qkv.to(at::kDouble).set_requires_grad(true);
  const auto result = kernels::attention_reference(wide, shape.heads, {problem.sizes, false, false});
  return gradients_of(result.out, problem.d_out.to(at::kDouble), {wide})[0];
}

/// log2 of the softmax's denominator, in double.
at::Tensor expected_log_sum(const Problem& problem, const Shape& shape) {
  const at::Tensor parts = problem.qkv.to(at::kDouble)
                               .view({shape.batch, shape.tokens, 3, shape.heads, shape.head_dim})
                               .permute({2, 0, 3, 1, 4});
  at::Tensor logits = at::matmul(parts[0], parts[1].transpose(-1, -2)) / std::sqrt(double(shape.head_dim));
  if (problem.sizes.defined())
    logits = logits + at::log(problem.sizes.to(at::kDouble)).view({shape.batch, 1, 1, shape.tokens});
  return at::logsumexp(logits, -1) / std::log(2.0);
}

/// Of the largest gradient. 16-bit types round P, dS, out and the result: each to 2^-9 or 2^-12 of its value.
double tolerance_of(DType dtype) {
  return dtype == DType::fp32 ? 1e-5 : dtype == DType::bf16 ? 1e-2 : 2e-3;
}

void check_gradient(const at::Tensor& found, const at::Tensor& expected, const Shape& shape, DType dtype) {
  CHECK(relative_difference(found, expected) < tolerance_of(dtype));
  if (shape.tokens < 8) return;  // of one token dQ and dK are 0, of few they may be small beside dV
  const char* const names[] = {"dQ", "dK", "dV"};
  for (int part = 0; part < 3; ++part) {
    CAPTURE(names[part]);
    CHECK(relative_difference(found.chunk(3, -1)[part], expected.chunk(3, -1)[part]) < 2 * tolerance_of(dtype));
  }
}

}  // namespace

TEST_CASE("attention's gradient on the GPU equals that of its reference in double", "[gpu][attention_backward]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  const bool sized = GENERATE(false, true);
  CAPTURE(scalar_type(dtype), shape.batch, shape.tokens, shape.heads, shape.head_dim, sized);
  const Problem problem = problem_of(shape, dtype, sized);
  const Outcome found = on_device(problem, shape, dtype);
  check_gradient(found.d_qkv, expected_gradient(problem, shape), shape, dtype);
  // Logits are of fp32 sums for every type.
  CHECK(max_difference(found.log_sum, expected_log_sum(problem, shape)) < 1e-4);
  CHECK(at::equal(forward_only(problem, shape, dtype), found.out));
  const Outcome again = on_device(problem, shape, dtype);
  CHECK(at::equal(again.d_qkv, found.d_qkv));
  CHECK(at::equal(again.log_sum, found.log_sum));
}

TEST_CASE("Hopper's gradient of attention equals its reference in double, for every number of tiles and chunks",
          "[gpu][attention_backward]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::bf16, DType::fp16);
  const int64_t tokens =
      GENERATE(1, 2, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 66, 80, 81, 95, 96, 97, 112, 113, 123, 127, 128,
               129, 130, 144, 145, 157, 160, 161, 176, 177, 191, 192, 193, 194, 197, 207, 208, 209);
  const bool sized = GENERATE(false, true);
  CAPTURE(scalar_type(dtype), tokens, sized);
  const Shape shape{3, tokens, 3, 64};
  const Problem problem = problem_of(shape, dtype, sized);
  const at::Tensor expected = expected_gradient(problem, shape);
  const at::Tensor log_sum = expected_log_sum(problem, shape);
  const Outcome found = on_device(problem, shape, dtype);
  check_gradient(found.d_qkv, expected, shape, dtype);
  CHECK(max_difference(found.log_sum, log_sum) < 1e-4);
  CHECK(at::equal(forward_only(problem, shape, dtype), found.out));
  const test::EnvironmentVariable limit("PYRA_CUDA_SHARED_MEMORY", kNotHopper);
  const Outcome portable = on_device(problem, shape, dtype);
  check_gradient(portable.d_qkv, expected, shape, dtype);
  CHECK(max_difference(portable.log_sum, log_sum) < 1e-4);
}

TEST_CASE("an image's gradient of attention on the GPU does not depend on its batch mates",
          "[gpu][attention_backward]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto shape = GENERATE(from_range(std::begin(kMates), std::end(kMates)));
  const bool sized = GENERATE(false, true);
  CAPTURE(scalar_type(dtype), shape.batch, shape.tokens, shape.heads, shape.head_dim, sized);
  const Problem problem = problem_of(shape, dtype, sized);
  const Outcome together = on_device(problem, shape, dtype);
  for (const int64_t image : {int64_t{0}, shape.batch / 2, shape.batch - 1}) {
    const Outcome alone = on_device(problem.image(image), shape, dtype);
    CHECK(at::equal(alone.d_qkv, together.d_qkv.narrow(0, image, 1)));
    CHECK(at::equal(alone.log_sum, together.log_sum.narrow(0, image, 1)));
  }
}

TEST_CASE("attention's gradient on the GPU does not depend on how much shared memory there is",
          "[gpu][attention_backward]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto shape =
      GENERATE(Shape{2, 197, 3, 64}, Shape{1, 300, 2, 80}, Shape{1, 1024, 1, 128}, Shape{9, 20, 12, 128});
  CAPTURE(scalar_type(dtype), shape.batch, shape.tokens, shape.heads, shape.head_dim);
  const Problem problem = problem_of(shape, dtype, true);
  const auto with = [&](const char* bytes) {
    const test::EnvironmentVariable limit("PYRA_CUDA_SHARED_MEMORY", bytes);
    return on_device(problem, shape, dtype);
  };
  const Outcome roomy = with(kNotHopper);
  for (const char* bytes : {"49152", "101376"}) CHECK(at::equal(with(bytes).d_qkv, roomy.d_qkv));
}

TEST_CASE("attention's gradient on the GPU stands large logits", "[gpu][attention_backward]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16);
  const double scale = GENERATE(30.0, 1e3);
  const int64_t tokens = GENERATE(40, 150);
  const Shape shape{2, tokens, 2, 64};
  CAPTURE(scalar_type(dtype), scale, tokens);
  const Outcome found = on_device(problem_of(shape, dtype, false, scale), shape, dtype);
  CHECK(at::isfinite(found.d_qkv).all().item<bool>());
  CHECK(at::isfinite(found.log_sum).all().item<bool>());
}

TEST_CASE("attention's gradient on the GPU is zero where none comes in", "[gpu][attention_backward]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const int64_t tokens = GENERATE(20, 70, 197);
  const Shape shape{2, tokens, 3, 64};
  CAPTURE(scalar_type(dtype), tokens);
  Problem problem = problem_of(shape, dtype, true);
  problem.d_out[0].zero_();
  const at::Tensor d_qkv = on_device(problem, shape, dtype).d_qkv;
  CHECK(at::equal(d_qkv[0], at::zeros_like(d_qkv[0])));
  CHECK(d_qkv[1].abs().max().item<double>() > 0.1);
}

TEST_CASE("attention's gradient on the GPU refuses what it cannot do", "[gpu][attention_backward]") {
  PYRA_NEEDS_GPU();
  const OnDevice memory({1, 4, 96}, at::kFloat);
  const auto code_of = [&](const std::function<void(AttentionBackwardCall&)>& change) {
    AttentionBackwardCall call;
    call.qkv = call.out = call.d_out = memory.get();
    call.log_sum = memory.get<float>();
    call.d_qkv = memory.get();
    call.batch = 1;
    call.tokens = 4;
    call.heads = 2;
    call.head_dim = 16;
    call.dtype = DType::fp32;
    change(call);
    try {
      kernels::cuda::attention_backward(call, nullptr);
    } catch (const Error& error) {
      return error.code();
    }
    return ExitCode::ok;
  };
  using Call = AttentionBackwardCall;
  check_head_limits<Call>(code_of);
  CHECK(code_of([](Call& call) { call.dtype = static_cast<DType>(7); }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.qkv = nullptr; }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.qkv = static_cast<const char*>(call.qkv) + 4; }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.out = nullptr; }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.log_sum = nullptr; }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.d_out = nullptr; }) == ExitCode::usage);
  CHECK(code_of([](Call& call) { call.d_qkv = nullptr; }) == ExitCode::usage);
}
