#include "kernels/layer_norm.h"

#include "tensors.h"

using namespace pyra;
using namespace pyra::kernels;
using namespace pyra::test;

TEST_CASE("layer_norm equals its reference in double", "[kernels][layer_norm]") {
  const auto dtype = GENERATE(at::kFloat, at::kBFloat16);
  const int64_t rows = GENERATE(1, 3, 197, 630), channels = GENERATE(1, 7, 16, 64, 192, 200, 384);
  CAPTURE(dtype, rows, channels);
  const at::Tensor x = seeded({rows, channels}, 1, 3.0) + 2.0, weight = seeded({channels}, 2),
                   bias = seeded({channels}, 3);
  const at::Tensor expected =
      layer_norm_reference(x.to(at::kDouble), weight.to(at::kDouble), bias.to(at::kDouble), 1e-6, at::kDouble);
  const at::Tensor y = layer_norm(x, weight, bias, 1e-6, dtype);
  CHECK(y.scalar_type() == dtype);
  CHECK(relative_difference(y, expected) < tolerance(dtype));
}

TEST_CASE("layer_norm's gradients equal those of its reference in double", "[kernels][layer_norm]") {
  const int64_t rows = GENERATE(1, 40, 700), channels = GENERATE(5, 64, 192, 200);
  CAPTURE(rows, channels);
  const at::Tensor x = seeded({rows, channels}, 1).set_requires_grad(true);
  const at::Tensor weight = seeded({channels}, 2).set_requires_grad(true);
  const at::Tensor bias = seeded({channels}, 3).set_requires_grad(true);
  const at::Tensor cotangent = seeded({rows, channels}, 4);
  std::vector<at::Tensor> wide;
  for (const at::Tensor& tensor : {x, weight, bias}) {
    wide.push_back(tensor.detach().to(at::kDouble).set_requires_grad(true));
  }
  const auto found = gradients_of(layer_norm(x, weight, bias, 1e-5, at::kFloat), cotangent, {x, weight, bias});
  const auto expected =
      gradients_of(layer_norm_reference(wide[0], wide[1], wide[2], 1e-5, at::kDouble), cotangent.to(at::kDouble), wide);
  for (size_t i = 0; i < 3; ++i) CHECK(relative_difference(found[i], expected[i]) < 1e-5);
}

TEST_CASE("layer_norm in bf16 sends gradients back in fp32", "[kernels][layer_norm]") {
  const at::Tensor x = seeded({30, 96}, 1).set_requires_grad(true);
  const at::Tensor weight = seeded({96}, 2), bias = seeded({96}, 3);
  const at::Tensor cotangent = seeded({30, 96}, 4).to(at::kBFloat16);
  const auto found = gradients_of(layer_norm(x, weight, bias, 1e-6, at::kBFloat16), cotangent, {x})[0];
  const auto expected =
      gradients_of(layer_norm_reference(x, weight, bias, 1e-6, at::kFloat), cotangent.to(at::kFloat), {x})[0];
  CHECK(found.scalar_type() == at::kFloat);
  CHECK(relative_difference(found, expected) < 1e-5);
  CHECK_FALSE(weight.grad().defined());
}

TEST_CASE("layer_norm stands a large mean", "[kernels][layer_norm]") {
  const at::Tensor x = seeded({20, 192}, 1) + 3000.0, weight = at::ones({192}), bias = at::zeros({192});
  const at::Tensor expected = layer_norm_reference(x.to(at::kDouble), weight, bias, 1e-6, at::kDouble);
  CHECK(relative_difference(layer_norm(x, weight, bias, 1e-6, at::kFloat), expected) < 1e-3);
}

TEST_CASE("a row of layer_norm does not depend on the others or on threads", "[kernels][layer_norm]") {
  const at::Tensor x = seeded({301, 192}, 1), weight = seeded({192}, 2), bias = seeded({192}, 3);
  const at::Tensor together = layer_norm(x, weight, bias, 1e-6, at::kFloat);
  with_threads(3, [&] { CHECK(at::equal(layer_norm(x, weight, bias, 1e-6, at::kFloat), together)); });
  for (const int64_t row : {0, 17, 300}) {
    const at::Tensor alone = layer_norm(x.narrow(0, row, 1).contiguous(), weight, bias, 1e-6, at::kFloat);
    CHECK(at::equal(alone, together.narrow(0, row, 1)));
  }
}

TEST_CASE("layer_norm refuses shapes that do not fit", "[kernels][layer_norm]") {
  CHECK_THROWS_WITH(layer_norm(at::zeros({2, 4}), at::zeros({5}), at::zeros({4}), 1e-6, at::kFloat),
                    Catch::Contains("[5]"));
  CHECK_THROWS_WITH(layer_norm(at::zeros({2, 4}), at::zeros({4}), at::zeros({4}), 1e-6, at::kDouble),
                    Catch::Contains("fp32 or bf16"));
}

TEST_CASE("layer_norm's other paths pass the same tests", "[kernels][layer_norm][rerun]") {
  for (const std::string& kernel : other_kernels()) {
    const RunResult result = rerun_with_kernel(kernel, "[layer_norm]");
    INFO(kernel << "\n" << result.out << result.err);
    CHECK(result.exit_code == 0);
  }
}
