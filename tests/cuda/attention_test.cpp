#include "kernels/attention.h"

#include <functional>

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/cuda/attention.h"
#include "kernels/tensors.h"
#include "support.h"

using namespace pyra;
using namespace pyra::test;
using kernels::cuda::AttentionCall;
using kernels::cuda::DType;

namespace {

struct Shape {
  int64_t batch, tokens, heads, head_dim;
};

/// Of whole and partial tiles, of several heads a block and several blocks a head, of keys that stay and keys in a
/// ring.
const Shape kShapes[] = {{1, 197, 12, 64}, {3, 157, 3, 64}, {2, 1, 2, 64},   {3, 2, 4, 16},    {40, 8, 12, 64},
                         {90, 27, 6, 64},  {70, 37, 8, 64}, {2, 33, 3, 32},  {2, 51, 2, 48},   {1, 257, 2, 80},
                         {2, 100, 3, 96},  {1, 31, 2, 112}, {2, 65, 2, 128}, {1, 1024, 2, 64}, {1, 600, 1, 128}};
const Shape kMates[] = {{90, 27, 12, 64}, {37, 197, 12, 64}, {70, 8, 12, 64}, {5, 45, 3, 80}, {9, 600, 2, 64}};

/// Shared memory that makes a Hopper GPU stand for one without its way of attention.
constexpr const char* kNotHopper = "200000";

struct Outcome {
  at::Tensor out, class_rows;
};

at::Tensor qkv_of(const Shape& shape, DType dtype, double scale = 1.0) {
  return seeded({shape.batch, shape.tokens, 3 * shape.heads * shape.head_dim}, 1, scale).to(scalar_type(dtype));
}

at::Tensor sizes_of(const Shape& shape) {
  return seeded({shape.batch, shape.tokens}, 2).abs().mul(3).floor().add(1);
}

AttentionCall call_of(const Shape& shape, DType dtype) {
  AttentionCall call;
  call.batch = int(shape.batch);
  call.tokens = int(shape.tokens);
  call.heads = int(shape.heads);
  call.head_dim = int(shape.head_dim);
  call.dtype = dtype;
  return call;
}

Outcome on_device(const at::Tensor& qkv, const at::Tensor& sizes, const Shape& shape, DType dtype, bool rows = true) {
  const int64_t batch = qkv.size(0);
  const OnDevice input(qkv), sizes_there(sizes.defined() ? sizes : at::zeros({1}));
  const OnDevice out({batch, shape.tokens, shape.heads * shape.head_dim}, qkv.scalar_type());
  const OnDevice class_rows({batch, shape.heads, shape.tokens}, at::kFloat);
  AttentionCall call = call_of({batch, shape.tokens, shape.heads, shape.head_dim}, dtype);
  call.qkv = input.get();
  call.sizes = sizes.defined() ? sizes_there.get<float>() : nullptr;
  call.out = out.get();
  call.class_rows = rows ? class_rows.get<float>() : nullptr;
  kernels::cuda::attention(call, nullptr);
  return {out.cpu(), class_rows.cpu()};
}

double tolerance_of(DType dtype) {
  return dtype == DType::fp16 ? 2e-3 : tolerance(scalar_type(dtype));
}

}  // namespace

TEST_CASE("attention on the GPU equals its reference in double", "[gpu][attention]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  const bool sized = GENERATE(false, true);
  CAPTURE(scalar_type(dtype), shape.batch, shape.tokens, shape.heads, shape.head_dim, sized);
  const at::Tensor qkv = qkv_of(shape, dtype), sizes = sized ? sizes_of(shape) : at::Tensor();
  const Outcome found = on_device(qkv, sizes, shape, dtype);
  const auto expected = kernels::attention_reference(qkv.to(at::kDouble), shape.heads, {sizes, false, true});
  CHECK(relative_difference(found.out, expected.out) < tolerance_of(dtype));
  // Sums are fp32 for every type, so the class row is as precise as fp32 logits allow.
  CHECK(relative_difference(found.class_rows.mean(1), expected.class_attention) < 3e-5);
  CHECK(max_difference(found.class_rows.sum(-1), at::ones({shape.batch, shape.heads})) < 1e-5);
  CHECK(at::equal(on_device(qkv, sizes, shape, dtype, /*rows=*/false).out, found.out));
  CHECK(at::equal(on_device(qkv, sizes, shape, dtype).out, found.out));
}

TEST_CASE("an image's attention on the GPU does not depend on its batch mates", "[gpu][attention]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto shape = GENERATE(from_range(std::begin(kMates), std::end(kMates)));
  CAPTURE(scalar_type(dtype), shape.batch, shape.tokens, shape.heads, shape.head_dim);
  const at::Tensor qkv = qkv_of(shape, dtype), sizes = sizes_of(shape);
  const Outcome together = on_device(qkv, sizes, shape, dtype);
  for (const int64_t image : {int64_t{0}, shape.batch / 2, shape.batch - 1}) {
    const Outcome alone = on_device(qkv.narrow(0, image, 1), sizes.narrow(0, image, 1), shape, dtype);
    CHECK(at::equal(alone.out, together.out.narrow(0, image, 1)));
    CHECK(at::equal(alone.class_rows, together.class_rows.narrow(0, image, 1)));
  }
  const Outcome reversed = on_device(qkv.flip({0}), sizes.flip({0}), shape, dtype);
  CHECK(at::equal(reversed.out.flip({0}), together.out));
  CHECK(at::equal(reversed.class_rows.flip({0}), together.class_rows));
}

TEST_CASE("Hopper's attention equals its reference in double, for every number of keys that a wgmma has",
          "[gpu][attention]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::bf16, DType::fp16);
  const int64_t tokens =
      GENERATE(16, 17, 32, 33, 48, 49, 64, 65, 80, 81, 96, 97, 128, 129, 160, 161, 208, 209, 256, 257);
  const bool sized = GENERATE(false, true);
  CAPTURE(scalar_type(dtype), tokens, sized);
  const Shape shape{3, tokens, 3, 64};
  const at::Tensor qkv = qkv_of(shape, dtype), sizes = sized ? sizes_of(shape) : at::Tensor();
  const auto expected = kernels::attention_reference(qkv.to(at::kDouble), shape.heads, {sizes, false, true});
  const Outcome found = on_device(qkv, sizes, shape, dtype);
  CHECK(relative_difference(found.out, expected.out) < tolerance_of(dtype));
  CHECK(relative_difference(found.class_rows.mean(1), expected.class_attention) < 3e-5);
  CHECK(at::equal(on_device(qkv, sizes, shape, dtype, /*rows=*/false).out, found.out));
  const test::EnvironmentVariable limit("PYRA_CUDA_SHARED_MEMORY", kNotHopper);
  CHECK(relative_difference(on_device(qkv, sizes, shape, dtype).out, expected.out) < tolerance_of(dtype));
}

TEST_CASE("attention on the GPU does not depend on how much shared memory there is", "[gpu][attention]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto shape =
      GENERATE(Shape{2, 197, 3, 64}, Shape{1, 300, 2, 80}, Shape{1, 1024, 1, 128}, Shape{60, 40, 12, 32});
  CAPTURE(scalar_type(dtype), shape.batch, shape.tokens, shape.heads, shape.head_dim);
  const at::Tensor qkv = qkv_of(shape, dtype), sizes = sizes_of(shape);
  const auto with = [&](const char* bytes) {
    const test::EnvironmentVariable limit("PYRA_CUDA_SHARED_MEMORY", bytes);
    return on_device(qkv, sizes, shape, dtype);
  };
  const Outcome roomy = with(kNotHopper);
  for (const char* bytes : {"49152", "101376"}) {
    const Outcome tight = with(bytes);
    CHECK(at::equal(tight.out, roomy.out));
    CHECK(at::equal(tight.class_rows, roomy.class_rows));
  }
}

TEST_CASE("attention on the GPU stands large logits", "[gpu][attention]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const double scale = GENERATE(30.0, 1e3);
  const Shape shape{1, 40, 2, 64};
  CAPTURE(scalar_type(dtype), scale);
  const at::Tensor qkv = qkv_of(shape, dtype, scale);
  const Outcome found = on_device(qkv, at::Tensor(), shape, dtype);
  CHECK(at::isfinite(found.out).all().item<bool>());
  CHECK(at::isfinite(found.class_rows).all().item<bool>());
  if (scale > 100) return;  // one key takes all: the values of two roundings need not agree
  CHECK(relative_difference(found.out, kernels::attention_reference(qkv.to(at::kDouble), shape.heads).out) < 2e-2);
}

TEST_CASE("a token of size two counts as two equal tokens on the GPU", "[gpu][attention]") {
  PYRA_NEEDS_GPU();
  const Shape shape{1, 6, 1, 16};
  const at::Tensor qkv = qkv_of(shape, DType::fp32);
  const at::Tensor twice = at::cat({qkv, qkv.narrow(1, 5, 1)}, 1);
  const at::Tensor sizes = at::tensor({1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 2.0f}).view({1, 6});
  const at::Tensor merged = on_device(qkv, sizes, shape, DType::fp32).out;
  const at::Tensor full = on_device(twice, at::Tensor(), {1, 7, 1, 16}, DType::fp32).out;
  CHECK(max_difference(merged, full.narrow(1, 0, 6)) < 1e-5);
}

TEST_CASE("attention on the GPU says how many blocks report, and they do", "[gpu][attention]") {
  PYRA_NEEDS_GPU();
  const Shape shape{3, GENERATE(5, 64, 197, 300), 2, GENERATE(32, 64)};
  const auto dtype = GENERATE(DType::bf16, DType::fp32);
  CAPTURE(shape.tokens, shape.head_dim, int(dtype));
  const at::Tensor qkv = qkv_of(shape, dtype);
  const OnDevice input(qkv), count(at::zeros({1}, at::kInt));
  const OnDevice out({shape.batch, shape.tokens, shape.heads * shape.head_dim}, qkv.scalar_type());
  AttentionCall call = call_of(shape, dtype);
  call.qkv = input.get();
  call.out = out.get();
  call.done = count.get<int>();
  const int blocks = kernels::cuda::attention(call, nullptr);
  CHECK(count.cpu().item<int>() == blocks);
  CHECK(kernels::cuda::attention_overlaps(call) == (blocks > 0));
  CHECK((blocks == 0 || blocks >= shape.batch * shape.heads));
  CHECK(at::equal(out.cpu(), on_device(qkv, at::Tensor(), shape, dtype, false).out));
  call.done = nullptr;
  CHECK(kernels::cuda::attention(call, nullptr) == 0);
}

TEST_CASE("attention on the GPU refuses what it cannot do", "[gpu][attention]") {
  PYRA_NEEDS_GPU();
  const OnDevice memory({1, 4, 96}, at::kFloat);
  const auto code_of = [&](const std::function<void(AttentionCall&)>& change) {
    AttentionCall call = call_of({1, 4, 2, 16}, DType::fp32);
    call.qkv = memory.get();
    call.out = memory.get();
    change(call);
    try {
      kernels::cuda::attention(call, nullptr);
    } catch (const Error& error) {
      return error.code();
    }
    return ExitCode::ok;
  };
  check_head_limits<AttentionCall>(code_of);
  CHECK(code_of([](AttentionCall& call) { call.qkv = nullptr; }) == ExitCode::usage);
  CHECK(code_of([](AttentionCall& call) { call.qkv = static_cast<const char*>(call.qkv) + 4; }) == ExitCode::usage);
  CHECK(code_of([](AttentionCall& call) { call.out = nullptr; }) == ExitCode::usage);
}
