#include "kernels/layer_norm.h"

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/cuda/layer_norm.h"
#include "kernels/tensors.h"

using namespace pyra;
using namespace pyra::test;
using kernels::cuda::DType;
using kernels::cuda::LayerNormCall;

namespace {

struct Parameters {
  explicit Parameters(int64_t channels)
      : weight(seeded({channels}, 2, 0.3) + 1), bias(seeded({channels}, 3)), w(weight), b(bias) {}
  at::Tensor weight, bias;
  OnDevice w, b;
};

/// LayerNorm on the device of the first C of every `stride` elements.
at::Tensor run(const at::Tensor& x, int64_t channels, const Parameters& p, DType residual, DType compute) {
  const OnDevice in(x.to(scalar_type(residual)));
  const OnDevice out({x.size(0), channels}, scalar_type(compute));
  LayerNormCall call;
  call.x = in.get();
  call.row_stride = x.size(1);
  call.rows = int(x.size(0));
  call.channels = int(channels);
  call.weight = p.w.get<float>();
  call.bias = p.b.get<float>();
  call.y = out.get();
  call.residual = residual;
  call.compute = compute;
  kernels::cuda::layer_norm(call, nullptr);
  return out.cpu();
}

}  // namespace

TEST_CASE("cuda layer_norm equals the reference", "[cuda][layer_norm][gpu]") {
  PYRA_NEEDS_GPU();
  const auto residual = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto compute = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const int64_t channels = GENERATE(8, 192, 264, 384, 768, 1024, 1280, 4096);
  const int64_t rows = GENERATE(1, 2, 45), gap = GENERATE(0, 24);
  CAPTURE(int(residual), int(compute), channels, rows, gap);
  const Parameters p(channels);
  const at::Tensor x = (seeded({rows, channels + gap}, 1, 2.0) + 0.5).to(scalar_type(residual));
  const at::Tensor expected = kernels::layer_norm_reference(
      x.slice(1, 0, channels).to(at::kDouble), p.weight.to(at::kDouble), p.bias.to(at::kDouble), 1e-6, at::kDouble);
  const at::Tensor y = run(x, channels, p, residual, compute);
  CHECK(y.scalar_type() == scalar_type(compute));
  CHECK(relative_difference(y, expected) < rounding_limit(compute));
}

TEST_CASE("a row of cuda layer_norm does not depend on the others", "[cuda][layer_norm][gpu]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const int64_t channels = GENERATE(192, 768, 1024);
  CAPTURE(int(dtype), channels);
  const Parameters p(channels);
  const int64_t rows = 6001;  // enough for two rows a warp
  const at::Tensor x = seeded({rows, channels}, 1);
  const at::Tensor together = run(x, channels, p, dtype, dtype);
  CHECK(at::equal(run(x, channels, p, dtype, dtype), together));
  CHECK(at::equal(run(x.flip(0), channels, p, dtype, dtype), together.flip(0)));
  for (const int64_t row : {int64_t(0), int64_t(77), rows - 1})
    CHECK(at::equal(run(x.narrow(0, row, 1).contiguous(), channels, p, dtype, dtype), together.narrow(0, row, 1)));
}

TEST_CASE("cuda layer_norm stands a large mean", "[cuda][layer_norm][gpu]") {
  PYRA_NEEDS_GPU();
  const Parameters p(768);
  const at::Tensor x = seeded({20, 768}, 1) + 3000.0;
  const at::Tensor expected = kernels::layer_norm_reference(x.to(at::kDouble), p.weight, p.bias, 1e-6, at::kDouble);
  CHECK(relative_difference(run(x, 768, p, DType::fp32, DType::fp32), expected) < 1e-3);
}

TEST_CASE("cuda mean_of_tokens is the mean", "[cuda][layer_norm][gpu]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const int64_t tokens = GENERATE(2, 8, 197), channels = GENERATE(8, 384, 1000);
  const int first = GENERATE(0, 1);
  CAPTURE(int(dtype), tokens, channels, first);
  const at::Tensor x = seeded({3, tokens, channels}, 1).to(scalar_type(dtype));
  const auto run_mean = [&](const at::Tensor& images) {
    const OnDevice in(images), out({images.size(0), channels}, at::kFloat);
    kernels::cuda::mean_of_tokens(in.get(), dtype, int(images.size(0)), int(tokens), first, int(channels),
                                  out.get<float>(), nullptr);
    return out.cpu();
  };
  const at::Tensor mean = run_mean(x);
  CHECK(relative_difference(mean, x.to(at::kDouble).slice(1, first).mean(1)) < 1e-5);
  CHECK(at::equal(run_mean(x.flip(0)), mean.flip(0)));
  CHECK(at::equal(run_mean(x.narrow(0, 1, 1).contiguous()), mean.narrow(0, 1, 1)));
}

TEST_CASE("cuda layer_norm refuses what it cannot read", "[cuda][layer_norm][gpu]") {
  PYRA_NEEDS_GPU();
  const OnDevice memory({64}, at::kFloat);
  const auto* floats = memory.get<float>();
  LayerNormCall call{memory.get(), 16, 2, 16, floats, floats, 1e-6f, memory.get(), DType::fp32, DType::fp32};
  SECTION("channels") {
    call.channels = 12;
    CHECK_THROWS_WITH(kernels::cuda::layer_norm(call, nullptr), Catch::Contains("12 channels"));
  }
  SECTION("rows that overlap") {
    call.row_stride = 8;
    CHECK_THROWS_WITH(kernels::cuda::layer_norm(call, nullptr), Catch::Contains("8 elements apart"));
  }
  SECTION("null") {
    call.bias = nullptr;
    CHECK_THROWS_WITH(kernels::cuda::layer_norm(call, nullptr), Catch::Contains("bias is null"));
  }
  SECTION("alignment") {
    call.x = floats + 1;
    CHECK_THROWS_WITH(kernels::cuda::layer_norm(call, nullptr), Catch::Contains("aligned"));
  }
  SECTION("no tokens to take the mean of") {
    CHECK_THROWS_AS(kernels::cuda::mean_of_tokens(floats, DType::fp32, 1, 2, 2, 8, memory.get<float>(), nullptr),
                    Error);
  }
}
