// LayerNorm in training against autograd in double: with the addition before it, its gradient, and the rows of a head.
#include "kernels/cuda/norm_train.h"

#include <optional>

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/tensors.h"

using namespace pyra;
using namespace pyra::test;
using namespace kernels::cuda;

namespace {

constexpr double kEps = 1e-6;

struct Sizes {
  int64_t images, tokens, channels;
};
/// Every shape a row takes in a warp, full and not: one token alone, rows that do not fill a block of warps.
const Sizes kShapes[] = {{1, 1, 192},  {3, 5, 8},     {2, 17, 200}, {2, 9, 256},  {3, 11, 384}, {1, 2, 512},
                         {5, 41, 768}, {2, 33, 1024}, {1, 3, 1000}, {1, 7, 1280}, {1, 5, 4096}, {2, 3, 2048}};

struct Case {
  Case(const Sizes& sizes, DType type)
      : s(sizes),
        compute(type),
        x(seeded({s.images, s.tokens, s.channels}, 1, 2.0) + 0.5),
        // Values that the compute type can hold: the reference sees what the kernel sees.
        branch(seeded({s.images, s.tokens, s.channels}, 2).to(scalar_type(type))),
        scale(seeded({s.images}, 3).abs() + 0.5),
        weight(seeded({s.channels}, 4, 0.3) + 1),
        bias(seeded({s.channels}, 5)),
        d_y(seeded({s.images, s.tokens, s.channels}, 6).to(scalar_type(type))),
        d_x(seeded({s.images, s.tokens, s.channels}, 7)) {}
  Sizes s;
  DType compute;
  at::Tensor x, branch, scale, weight, bias, d_y, d_x;  ///< branch and scale may be undefined
  bool normed = true, branch_gradient = true;
  int64_t gap = 0;  ///< columns behind each row of y and d_y

  [[nodiscard]] int rows() const { return int(s.images * s.tokens); }
  [[nodiscard]] Case image(int64_t i) const {
    Case one = *this;
    one.s.images = 1;
    for (at::Tensor* t : {&one.x, &one.branch, &one.scale, &one.d_y, &one.d_x})
      if (t->defined()) *t = t->narrow(0, i, 1).contiguous();
    return one;
  }
};

struct Forward {
  at::Tensor x, normalised, inverse, y;  ///< y with the columns behind
};
struct Backward {
  at::Tensor d_x, d_branch;
};

/// The device's copy of a tensor that may be missing.
template <class T = void>
T* optional_copy(std::optional<OnDevice>& memory, const at::Tensor& tensor) {
  if (!tensor.defined()) return nullptr;
  memory.emplace(tensor);
  return memory->get<T>();
}

Forward forward(const Case& c) {
  const at::ScalarType type = scalar_type(c.compute);
  const int64_t stride = c.s.channels + c.gap;
  const OnDevice x(c.x), weight(c.weight), bias(c.bias), normalised(c.x.sizes(), type),
      inverse({c.s.images, c.s.tokens}, at::kFloat), y({c.s.images, c.s.tokens, stride}, type);
  std::optional<OnDevice> branch, scale;
  AddNormCall call;
  call.x = x.get<float>();
  call.branch = optional_copy(branch, c.branch);
  call.branch_scale = optional_copy<float>(scale, c.scale);
  call.rows_per_image = int(c.s.tokens);
  call.rows = c.rows();
  call.channels = int(c.s.channels);
  call.compute = c.compute;
  if (c.normed) {
    call.weight = weight.get<float>();
    call.bias = bias.get<float>();
    call.eps = float(kEps);
    call.normalised = normalised.get();
    call.inverse_deviation = inverse.get<float>();
    call.y = y.get();
    call.y_stride = stride;
  }
  add_norm(call, nullptr);
  return {x.cpu(), normalised.cpu(), inverse.cpu(), y.cpu()};
}

Backward backward(const Case& c, const Forward& f) {
  // The columns behind d_y are another layer's: NaN there must not be seen.
  at::Tensor d_y = at::full({c.s.images, c.s.tokens, c.s.channels + c.gap}, std::nan(""), c.d_y.options());
  d_y.slice(2, 0, c.s.channels).copy_(c.d_y);
  const OnDevice given(d_y), normalised(f.normalised), inverse(f.inverse), weight(c.weight), d_x(c.d_x),
      d_branch(c.x.sizes(), scalar_type(c.compute));
  std::optional<OnDevice> scale;
  NormBackwardCall call;
  call.d_y = given.get();
  call.d_y_stride = c.s.channels + c.gap;
  call.normalised = normalised.get();
  call.inverse_deviation = inverse.get<float>();
  call.weight = weight.get<float>();
  call.d_x = d_x.get<float>();
  call.d_branch = c.branch_gradient ? d_branch.get() : nullptr;
  call.branch_scale = optional_copy<float>(scale, c.scale);
  call.rows_per_image = int(c.s.tokens);
  call.rows = c.rows();
  call.channels = int(c.s.channels);
  call.compute = c.compute;
  norm_backward(call, nullptr);
  return {d_x.cpu(), d_branch.cpu()};
}

at::Tensor scaled(const Case& c, const at::Tensor& d_x) {
  const OnDevice given(d_x), out(d_x.sizes(), scalar_type(c.compute));
  std::optional<OnDevice> scale;
  scale_rows({.d_x = given.get<float>(),
              .branch_scale = optional_copy<float>(scale, c.scale),
              .rows_per_image = int(c.s.tokens),
              .rows = c.rows(),
              .channels = int(c.s.channels),
              .out = out.get(),
              .compute = c.compute},
             nullptr);
  return out.cpu();
}

bool equal(const Forward& a, const Forward& b, int64_t channels) {
  return at::equal(a.x, b.x) && at::equal(a.normalised, b.normalised) && at::equal(a.inverse, b.inverse) &&
         at::equal(a.y.slice(2, 0, channels), b.y.slice(2, 0, channels));
}
bool equal(const Backward& a, const Backward& b) {
  return at::equal(a.d_x, b.d_x) && at::equal(a.d_branch, b.d_branch);
}

at::Tensor in_double(const at::Tensor& t) {
  return t.to(at::kDouble);
}
at::Tensor normed(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  return at::layer_norm(x, {x.size(-1)}, in_double(weight), in_double(bias), kEps);
}

}  // namespace

TEST_CASE("cuda add_norm and its gradient equal autograd", "[cuda][norm_train][gpu]") {
  PYRA_NEEDS_GPU();
  const auto compute = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  const int64_t gap = GENERATE(0, 24);
  CAPTURE(int(compute), shape.images, shape.tokens, shape.channels, gap);
  Case c(shape, compute);
  c.gap = gap;
  const at::Tensor x = in_double(c.x).requires_grad_(), branch = in_double(c.branch).requires_grad_();
  const at::Tensor sum = x + branch * in_double(c.scale).view({-1, 1, 1});
  const at::Tensor y = normed(sum, c.weight, c.bias);
  const at::Tensor inverse = at::rsqrt(sum.var(-1, /*unbiased=*/false) + kEps);
  const auto gradients = gradients_of((y * in_double(c.d_y)).sum() + (sum * in_double(c.d_x)).sum(),
                                      at::ones({}, at::kDouble), {x, branch});

  const Forward f = forward(c);
  CHECK(relative_difference(f.x, sum) < 1e-6);
  CHECK(relative_difference(f.inverse, inverse) < 1e-5);
  CHECK(relative_difference(f.normalised, (sum - sum.mean(-1, true)) * inverse.unsqueeze(-1)) <
        rounding_limit(compute));
  CHECK(relative_difference(f.y.slice(2, 0, shape.channels), y) < rounding_limit(compute));
  CHECK(f.y.slice(2, shape.channels).isnan().all().item<bool>());  // nothing was written behind
  const Backward b = backward(c, f);
  CHECK(relative_difference(b.d_x, gradients[0]) < rounding_limit(compute));
  CHECK(relative_difference(b.d_branch, gradients[1]) < rounding_limit(compute));
}

TEST_CASE("cuda norm_backward's branch is its stream, scaled and rounded", "[cuda][norm_train][gpu]") {
  PYRA_NEEDS_GPU();
  const auto compute = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  const bool has_scale = GENERATE(true, false);
  CAPTURE(int(compute), shape.tokens, shape.channels, has_scale);
  Case c(shape, compute);
  if (!has_scale) c.scale = at::Tensor();
  const Forward f = forward(c);
  const Backward b = backward(c, f);
  const at::Tensor by = has_scale ? c.scale.view({-1, 1, 1}) : at::ones({1, 1, 1});
  CHECK(at::equal(b.d_branch, (b.d_x * by).to(scalar_type(compute))));
  CHECK(at::equal(b.d_branch, scaled(c, b.d_x)));
  c.branch_gradient = false;
  const Backward alone = backward(c, f);
  CHECK(at::equal(alone.d_x, b.d_x));
  CHECK(alone.d_branch.isnan().all().item<bool>());
}

TEST_CASE("cuda add_norm adds exactly, with and without a norm", "[cuda][norm_train][gpu]") {
  PYRA_NEEDS_GPU();
  const auto compute = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  CAPTURE(int(compute), shape.tokens, shape.channels);
  Case c(shape, compute);
  Case only = c;
  only.normed = false;
  CHECK(at::equal(forward(only).x, forward(c).x));
  only.scale = c.scale = at::Tensor();
  CHECK(at::equal(forward(only).x, c.x + c.branch.to(at::kFloat)));
  c.branch = only.branch = at::Tensor();
  CHECK(at::equal(forward(only).x, c.x));
  const Forward f = forward(c);
  CHECK(at::equal(f.x, c.x));
  CHECK(relative_difference(f.y, normed(in_double(c.x), c.weight, c.bias)) < rounding_limit(compute));
}

TEST_CASE("a dropped branch leaves its image's stream and gets no gradient", "[cuda][norm_train][gpu]") {
  PYRA_NEEDS_GPU();
  const auto compute = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  Case c({4, 13, 384}, compute);
  c.scale[2] = 0;
  const Forward f = forward(c);
  CHECK(at::equal(f.x[2], c.x[2]));
  CHECK_FALSE(at::equal(f.x[1], c.x[1]));
  const Backward b = backward(c, f);
  CHECK((b.d_branch[2] == 0).all().item<bool>());
  CHECK_FALSE((b.d_branch[3] == 0).any().item<bool>());
}

TEST_CASE("an image's norm and gradient do not depend on its batch mates", "[cuda][norm_train][gpu]") {
  PYRA_NEEDS_GPU();
  const auto compute = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const int64_t channels = GENERATE(192, 200, 768, 1024, 1280);
  CAPTURE(int(compute), channels);
  const Case c({61, 99, channels}, compute);
  const Forward f = forward(c);
  const Backward b = backward(c, f);
  CHECK(equal(forward(c), f, channels));
  CHECK(equal(backward(c, f), b));
  for (const int64_t i : {0, 30, 60}) {
    const Case one = c.image(i);
    const Forward alone = forward(one);
    const auto own = [&](const at::Tensor& t) { return t.narrow(0, i, 1); };
    CHECK(equal(alone, {own(f.x), own(f.normalised), own(f.inverse), own(f.y)}, channels));
    CHECK(equal(backward(one, alone), {own(b.d_x), own(b.d_branch)}));
  }
}

TEST_CASE("cuda add_norm of a row without spread is the bias", "[cuda][norm_train][gpu]") {
  PYRA_NEEDS_GPU();
  Case c({1, 3, 768}, DType::fp32);
  c.x.zero_();
  c.branch = at::Tensor();
  const Forward f = forward(c);
  CHECK((f.normalised == 0).all().item<bool>());
  CHECK(at::equal(f.y[0][1], c.bias));
  CHECK(relative_difference(f.inverse, at::full({1, 3}, 1e3)) < 1e-5);
  CHECK(backward(c, f).d_x.isfinite().all().item<bool>());
}

TEST_CASE("the cuda norm before a head and its gradient equal autograd", "[cuda][norm_train][gpu]") {
  PYRA_NEEDS_GPU();
  const int64_t channels = GENERATE(8, 192, 200, 384, 768, 1024, 1280, 4096);
  const int64_t tokens = GENERATE(1, 2, 33, 197);
  const bool pooled = GENERATE(false, true);
  const int64_t first = GENERATE_COPY(int64_t(0), tokens / 2, tokens - 1);
  CAPTURE(channels, tokens, pooled, first);
  const int64_t batch = 3;
  const at::Tensor x = seeded({batch, tokens, channels}, 1, 2.0) + 0.5, weight = seeded({channels}, 2, 0.3) + 1,
                   bias = seeded({channels}, 3), d_y = seeded({batch, channels}, 4);
  const at::Tensor reference = in_double(x).requires_grad_();
  const at::Tensor read = pooled ? reference.slice(1, first).mean(1) : reference.select(1, first);
  const at::Tensor y = normed(read, weight, bias);

  // One token's rows stand a whole image apart; means stand densely.
  const OnDevice in(pooled ? read.detach().to(at::kFloat) : x), w(weight), b(bias), given(d_y),
      normalised({batch, channels}, at::kFloat), inverse({batch}, at::kFloat), out({batch, channels}, at::kFloat);
  const auto run_forward = [&] {
    norm_rows({.x = in.get<float>() + (pooled ? 0 : first * channels),
               .x_stride = pooled ? channels : tokens * channels,
               .weight = w.get<float>(),
               .bias = b.get<float>(),
               .eps = float(kEps),
               .normalised = normalised.get<float>(),
               .inverse_deviation = inverse.get<float>(),
               .y = out.get<float>(),
               .rows = int(batch),
               .channels = int(channels)},
              nullptr);
    return out.cpu();
  };
  const auto run_backward = [&] {
    const OnDevice d_x({batch, tokens, channels}, at::kFloat);  // NaN: all of it must be written
    norm_rows_backward({.d_y = given.get<float>(),
                        .normalised = normalised.get<float>(),
                        .inverse_deviation = inverse.get<float>(),
                        .weight = w.get<float>(),
                        .batch = int(batch),
                        .tokens = int(tokens),
                        .channels = int(channels),
                        .first = int(first),
                        .pooled = pooled,
                        .d_x = d_x.get<float>()},
                       nullptr);
    return d_x.cpu();
  };
  const at::Tensor features = run_forward(), d_x = run_backward();
  CHECK(relative_difference(features, y) < 1e-5);
  CHECK(relative_difference(d_x, gradients_of(y, in_double(d_y), {reference})[0]) < 1e-5);
  at::Tensor rest = d_x.clone();
  (pooled ? rest.slice(1, first) : rest.narrow(1, first, 1)).zero_();
  CHECK((rest == 0).all().item<bool>());
  CHECK(at::equal(run_forward(), features));
  CHECK(at::equal(run_backward(), d_x));
}

TEST_CASE("the cuda norms of training refuse what they cannot read", "[cuda][norm_train][gpu]") {
  PYRA_NEEDS_GPU();
  const OnDevice memory({256}, at::kFloat);
  auto* floats = memory.get<float>();
  AddNormCall add{.x = floats,
                  .branch = floats,
                  .weight = floats,
                  .bias = floats,
                  .normalised = floats,
                  .inverse_deviation = floats,
                  .y = floats,
                  .y_stride = 16,
                  .rows = 2,
                  .channels = 16};
  NormBackwardCall back{.d_y = floats,
                        .d_y_stride = 16,
                        .normalised = floats,
                        .inverse_deviation = floats,
                        .weight = floats,
                        .d_x = floats,
                        .rows = 2,
                        .channels = 16};
  NormRowsBackwardCall head{.d_y = floats,
                            .normalised = floats,
                            .inverse_deviation = floats,
                            .weight = floats,
                            .batch = 1,
                            .tokens = 2,
                            .channels = 16,
                            .d_x = floats};
  SECTION("channels") {
    add.channels = 12;
    CHECK_THROWS_WITH(add_norm(add, nullptr), Catch::Contains("12 channels"));
    back.channels = 4104;
    CHECK_THROWS_WITH(norm_backward(back, nullptr), Catch::Contains("4104 channels"));
  }
  SECTION("rows that overlap") {
    add.y_stride = 8;
    CHECK_THROWS_WITH(add_norm(add, nullptr), Catch::Contains("8 elements apart"));
    back.d_y_stride = 20;  // of bf16: 40 bytes
    CHECK_THROWS_WITH(norm_backward(back, nullptr), Catch::Contains("20 elements apart"));
  }
  SECTION("null") {
    add.inverse_deviation = nullptr;
    CHECK_THROWS_WITH(add_norm(add, nullptr), Catch::Contains("inverse_deviation is null"));
    back.d_x = nullptr;
    CHECK_THROWS_WITH(norm_backward(back, nullptr), Catch::Contains("d_x is null"));
    CHECK_THROWS_WITH(scale_rows({.d_x = floats, .rows = 1, .channels = 16}, nullptr), Catch::Contains("out is null"));
    CHECK_THROWS_WITH(norm_rows({.x = floats, .x_stride = 16, .rows = 1, .channels = 16}, nullptr),
                      Catch::Contains("weight is null"));
  }
  SECTION("alignment") {
    add.branch = floats + 1;
    CHECK_THROWS_WITH(add_norm(add, nullptr), Catch::Contains("aligned"));
    back.d_branch = floats + 1;
    CHECK_THROWS_WITH(norm_backward(back, nullptr), Catch::Contains("aligned"));
  }
  SECTION("images without rows") {
    add.rows_per_image = 0;
    CHECK_THROWS_AS(add_norm(add, nullptr), Error);
  }
  SECTION("a token that is not there") {
    head.first = 2;
    CHECK_THROWS_WITH(norm_rows_backward(head, nullptr), Catch::Contains("token 2 of 2"));
  }
  SECTION("no rows are no error") {
    CHECK_NOTHROW(add_norm({.channels = 16}, nullptr));
    CHECK_NOTHROW(norm_backward({.channels = 16}, nullptr));
    CHECK_NOTHROW(norm_rows_backward({.tokens = 1, .channels = 16}, nullptr));
  }
}
