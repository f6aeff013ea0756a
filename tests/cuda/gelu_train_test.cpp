// GELU and its slope against ATen's in double.
#include "kernels/cuda/gelu_train.h"

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/tensors.h"

using namespace pyra;
using namespace pyra::test;
using namespace kernels::cuda;

namespace {

/// Half a unit in the last place of a result, relative: of 8 significant bits and of 11.
double rounding(DType dtype) {
  return dtype == DType::fp32 ? 0 : dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
}

/// Is every element within `dtype`'s rounding of what is expected, and 1e-5 of `magnitude`? tanh near 1 is what costs:
/// 1 - t * t keeps no more, and x^3 stands before it.
bool close(const at::Tensor& got, const at::Tensor& expected, const at::Tensor& magnitude, DType dtype) {
  const at::Tensor bound = rounding(dtype) * expected.abs() + 1e-5 * magnitude + 1e-7;  // 1e-7: fp16's subnormals
  return ((got.to(at::kDouble) - expected).abs() <= bound).all().item<bool>();
}

/// Normal values, and a sweep through where the slope bends and both tails begin.
at::Tensor values(int64_t count, DType dtype) {
  at::Tensor x = seeded({count}, 1, 1.5);
  const int64_t swept = count / 2;
  x.slice(0, 0, swept).copy_(at::linspace(-12, 12, swept));
  x[count - 1] = 0;
  return x.to(scalar_type(dtype));
}

/// On the device with one vector more behind, which must stay as it was.
at::Tensor with_tail(const at::Tensor& t) {
  return at::cat({t, at::full({8}, 3.0, t.options())});
}
at::Tensor without_tail(const at::Tensor& t) {
  CHECK((t.slice(0, -8) == 3.0).all().item<bool>());
  return t.slice(0, 0, -8);
}

at::Tensor forward(const at::Tensor& x, DType dtype, bool tanh, bool in_place = false) {
  const OnDevice in(with_tail(x)), apart(with_tail(at::zeros_like(x)));
  const OnDevice& out = in_place ? in : apart;
  gelu_forward(in.get(), out.get(), dtype, x.numel(), tanh, nullptr);
  return without_tail(out.cpu());
}

at::Tensor backward(const at::Tensor& x, const at::Tensor& d, DType dtype, bool tanh) {
  const OnDevice in(x), out(with_tail(d));
  gelu_backward(in.get(), out.get(), dtype, x.numel(), tanh, nullptr);
  CHECK(at::equal(in.cpu(), x));
  return without_tail(out.cpu());
}

}  // namespace

TEST_CASE("cuda gelu and its slope equal ATen's", "[cuda][gelu_train][gpu]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const bool tanh = GENERATE(false, true);
  // One thread, a block but one, a block, one more, many.
  const int64_t count = GENERATE(8, 2040, 2048, 2056, 197 * 3072);
  CAPTURE(int(dtype), tanh, count);
  const at::Tensor x = values(count, dtype), d = seeded({count}, 2).to(scalar_type(dtype));
  const at::Tensor wide = x.to(at::kDouble), wide_d = d.to(at::kDouble);
  const char* form = tanh ? "tanh" : "none";
  const at::Tensor y = forward(x, dtype, tanh), back = backward(x, d, dtype, tanh);
  CHECK(close(y, at::gelu(wide, form), 1 + wide.abs(), dtype));
  CHECK(close(back, at::gelu_backward(wide_d, wide, form), wide_d.abs(), dtype));
  CHECK(at::equal(forward(x, dtype, tanh, /*in_place=*/true), y));
  CHECK(at::equal(forward(x, dtype, tanh), y));
  CHECK(at::equal(backward(x, d, dtype, tanh), back));
  // An element's result is its own, wherever it stands.
  CHECK(at::equal(forward(x.flip(0), dtype, tanh), y.flip(0)));
  CHECK(at::equal(backward(x.flip(0), d.flip(0), dtype, tanh), back.flip(0)));
}

TEST_CASE("cuda gelu lets no NaN disappear and spreads none", "[cuda][gelu_train][gpu]") {
  PYRA_NEEDS_GPU();
  const auto dtype = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const bool tanh = GENERATE(false, true);
  CAPTURE(int(dtype), tanh);
  at::Tensor x = values(64, dtype), d = seeded({64}, 2).to(scalar_type(dtype));
  x[13] = std::nan("");
  d[50] = std::nan("");
  const auto nans = [](const at::Tensor& t) { return t.isnan().sum().item<int64_t>(); };
  const at::Tensor y = forward(x, dtype, tanh), back = backward(x.nan_to_num(0), d, dtype, tanh);
  CHECK(nans(y) == 1);
  CHECK(y[13].isnan().item<bool>());
  CHECK(nans(back) == 1);
  CHECK(back[50].isnan().item<bool>());
}

TEST_CASE("cuda gelu refuses what it cannot read", "[cuda][gelu_train][gpu]") {
  PYRA_NEEDS_GPU();
  const OnDevice memory({64}, at::kFloat);
  auto* floats = memory.get<float>();
  CHECK_THROWS_WITH(gelu_forward(floats, floats, DType::fp32, 12, true, nullptr), Catch::Contains("12 values"));
  CHECK_THROWS_WITH(gelu_backward(floats, floats, DType::fp32, -8, true, nullptr), Catch::Contains("-8 values"));
  CHECK_THROWS_WITH(gelu_forward(nullptr, floats, DType::fp32, 8, true, nullptr), Catch::Contains("x is null"));
  CHECK_THROWS_WITH(gelu_backward(floats, nullptr, DType::fp32, 8, true, nullptr), Catch::Contains("d is null"));
  CHECK_THROWS_WITH(gelu_backward(floats + 1, floats, DType::fp32, 8, true, nullptr), Catch::Contains("aligned"));
  CHECK_NOTHROW(gelu_forward(nullptr, nullptr, DType::fp32, 0, true, nullptr));
}
