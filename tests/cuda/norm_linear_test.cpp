#include "kernels/cuda/norm_linear.h"

#include <optional>

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/layer_norm.h"
#include "kernels/tensors.h"

using namespace pyra;
using namespace pyra::test;
using kernels::cuda::DType;
using kernels::cuda::LayerNormCall;
using kernels::cuda::LinearCall;

namespace {

/// The first token of each of `rows` images of two tokens, normalised and classified, with or without logits to add to.
struct Head {
  Head(int64_t rows, int64_t channels, int64_t out, DType dtype)
      : x(seeded({rows, 2, channels}, 1, 2.0).to(scalar_type(dtype))),
        norm_weight(seeded({channels}, 2, 0.3) + 1),
        norm_bias(seeded({channels}, 3)),
        weight(seeded({out, channels}, 4, 0.1)),
        bias(seeded({out}, 5)),
        logits(seeded({rows, out}, 6)) {
    norm = {.row_stride = 2 * channels,
            .rows = int(rows),
            .channels = int(channels),
            .residual = dtype,
            .compute = DType::fp32};
    layer = {.rows = int(rows), .in = int(channels), .out = int(out), .compute = DType::fp32, .result = DType::fp32};
  }
  /// Undefined where the kernel does not take the call.
  [[nodiscard]] at::Tensor run(bool add) {
    const OnDevice in(x), gamma(norm_weight), beta(norm_bias), w(weight), b(bias);
    const OnDevice features({norm.rows, norm.channels}, at::kFloat);
    const OnDevice y = add ? OnDevice(logits) : OnDevice(logits.sizes(), at::kFloat);
    norm.x = in.get();
    norm.weight = gamma.get<float>();
    norm.bias = beta.get<float>();
    norm.y = features.get();
    layer.x = features.get();
    layer.weight = w.get();
    layer.bias = b.get();
    layer.residual = add ? y.get() : nullptr;
    layer.y = y.get();
    if (!kernels::cuda::norm_linear(norm, layer, nullptr)) return {};
    return y.cpu();
  }
  [[nodiscard]] at::Tensor expected(bool add) const {
    const at::Tensor features = kernels::layer_norm_reference(
        x.select(1, 0).to(at::kDouble), norm_weight.to(at::kDouble), norm_bias.to(at::kDouble), norm.eps, at::kDouble);
    const at::Tensor y = at::linear(features, weight.to(at::kDouble), bias.to(at::kDouble));
    return add ? y + logits : y;
  }

  at::Tensor x, norm_weight, norm_bias, weight, bias, logits;
  LayerNormCall norm;
  LinearCall layer;
};

}  // namespace

TEST_CASE("a layer of a few normalised rows on the GPU equals the reference", "[cuda][norm_linear][gpu]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const int64_t channels = GENERATE(8, 192, 264, 384, 768, 1024, 1280), out = GENERATE(1, 7, 10, 1000);
  const int64_t rows = GENERATE(1, 3, 8);
  CAPTURE(int(dtype), rows, channels, out);
  Head head(rows, channels, out, dtype);
  for (const bool add : {false, true}) {
    const at::Tensor y = head.run(add);
    REQUIRE(y.defined());
    CHECK(relative_difference(y, head.expected(add)) < 1e-5);
  }
}

TEST_CASE("a normalised row's layer on the GPU does not depend on the others", "[cuda][norm_linear][gpu]") {
  PYRA_NEEDS_GPU();
  const int64_t channels = GENERATE(192, 768);
  Head head(8, channels, 100, DType::fp32);
  const at::Tensor together = head.run(false);
  CHECK(at::equal(head.run(false), together));
  for (const int64_t row : {0, 5}) {
    Head alone(1, channels, 100, DType::fp32);
    alone.x = head.x.narrow(0, row, 1).contiguous();
    CHECK(at::equal(alone.run(false), together.narrow(0, row, 1)));
  }
}

TEST_CASE("a layer of normalised rows leaves to others what is not for it", "[cuda][norm_linear][gpu]") {
  PYRA_NEEDS_GPU();
  CHECK_FALSE(Head(9, 64, 10, DType::fp32).run(false).defined());
  CHECK_FALSE(Head(1, 2048, 10, DType::fp32).run(false).defined());
  Head head(2, 64, 10, DType::fp32);
  SECTION("rows of 16 bits behind the norm") {
    head.norm.compute = DType::bf16;
    CHECK_FALSE(head.run(false).defined());
  }
  SECTION("an epilogue") {
    head.layer.epilogue = kernels::cuda::Epilogue::gelu_tanh;
    CHECK_FALSE(head.run(false).defined());
  }
  SECTION("a layer for other rows is an error") {
    head.layer.in = 32;
    CHECK_THROWS_AS(head.run(false), Error);
  }
}
