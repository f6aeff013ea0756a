#include "kernels/cuda/merge_backward.h"

#include <optional>

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/cuda/merge.h"
#include "kernels/merge.h"
#include "kernels/tensors.h"

using namespace pyra;
using namespace pyra::test;
using kernels::MergeArguments;
using kernels::MergeGate;
using kernels::cuda::DType;
using kernels::cuda::MergeBackwardCall;
using kernels::cuda::MergeCall;

namespace {

const DType kTypes[] = {DType::fp32, DType::bf16, DType::fp16};

struct Variant {
  const char* name;
  bool weighted, gate;
};
const Variant kVariants[] = {
    {"ToMe", true, false}, {"PYRA", true, true}, {"DiffRate", false, false}, {"gate, mean", false, true}};

struct Sizes {
  int64_t batch, tokens, kept, merged, channels;
};
/// Rows of every instance, whole and partial; no pairs, one output for all, dropped tokens, plans beyond a warp. Of 140
/// images none is shared by several blocks, of one image many.
const Sizes kShapes[] = {{1, 1, 1, 0, 8},        {1, 2, 2, 0, 64},       {2, 2, 1, 1, 192},     {3, 17, 12, 5, 200},
                         {2, 17, 9, 3, 384},     {3, 197, 157, 40, 768}, {32, 37, 27, 10, 768}, {140, 19, 15, 4, 192},
                         {2, 101, 80, 21, 1024}, {5, 9, 5, 3, 1000},     {1, 60, 1, 59, 1280},  {1, 9, 6, 3, 1536},
                         {2, 300, 170, 130, 264}};

struct Case {
  at::Tensor x, sizes, d_out, branch_scale;
  MergeArguments plan;
};

/// A random plan: `kept` tokens stay, `merged` go to random ones, the rest are dropped.
Case make(const Sizes& s, const Variant& v) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t(s.tokens + s.channels));
  std::vector<at::Tensor> orders;
  for (int64_t i = 0; i < s.batch; ++i) orders.push_back(at::randperm(s.tokens, generator, at::kLong));
  const at::Tensor order = at::stack(orders);
  Case c;
  c.x = seeded({s.batch, s.tokens, s.channels}, 1);
  c.sizes = at::randint(1, 6, {s.batch, s.tokens}, generator, at::kFloat);
  c.d_out = seeded({s.batch, s.kept, s.channels}, 2);
  c.branch_scale = at::sigmoid(seeded({s.batch}, 3)) + 0.5;
  c.plan.keep = order.slice(1, 0, s.kept).contiguous();
  c.plan.src = order.slice(1, s.kept, s.kept + s.merged).contiguous();
  c.plan.dst = at::randint(0, s.kept, {s.batch, s.merged}, generator, at::kLong);
  c.plan.weighted = v.weighted;
  // Arguments of both sigmoids of about 1: of wide rows or many pairs they would else saturate, and gradients vanish.
  if (v.gate)
    c.plan.gate = MergeGate{.a = seeded({s.merged, 1}, 4, 1.0 / std::sqrt(double(std::max<int64_t>(1, s.merged)))),
                            .b = seeded({1, s.channels}, 5, 1.0 / std::sqrt(double(s.channels))),
                            .weight = seeded({s.channels}, 6, 0.3) + 1,
                            .bias = seeded({s.channels}, 7, 0.3),
                            .eps = 1e-5};
  return c;
}

struct Result {
  at::Tensor x, branch, gate;
  [[nodiscard]] bool equals(const Result& o) const {
    return at::equal(x, o.x) && at::equal(branch, o.branch) &&
           (gate.defined() ? at::equal(gate, o.gate) : !o.gate.defined());
  }
  [[nodiscard]] Result images(const at::Tensor& which) const {
    return {x.index_select(0, which), branch.index_select(0, which),
            gate.defined() ? gate.index_select(0, which) : gate};
  }
};

Case images(const Case& c, const at::Tensor& which) {
  Case out = c;
  for (at::Tensor* t :
       {&out.x, &out.sizes, &out.d_out, &out.branch_scale, &out.plan.keep, &out.plan.src, &out.plan.dst}) {
    *t = t->index_select(0, which);
  }
  return out;
}

/// What a caller may leave out.
struct Wanted {
  bool sizes = true, branch = true, scale = true, gate = true;
};

Result run(const Case& c, DType compute, const Wanted& wanted = {}) {
  const int64_t batch = c.x.size(0), kept = c.plan.keep.size(1), merged = c.plan.src.size(1), channels = c.x.size(2);
  const OnDevice x(c.x), sizes(c.sizes), keep(c.plan.keep.to(at::kInt)), src(c.plan.src.to(at::kInt)),
      dst(c.plan.dst.to(at::kInt)), d_out(c.d_out), scale(c.branch_scale);
  const OnDevice d_x(c.x.sizes(), at::kFloat), d_branch(c.x.sizes(), scalar_type(compute)),
      d_gate({batch, merged + 3 * channels}, at::kFloat);
  std::optional<OnDevice> a, b, weight, bias;
  MergeBackwardCall call;
  call.x = x.get<float>();
  call.sizes = wanted.sizes ? sizes.get<float>() : nullptr;
  call.keep = keep.get<int32_t>();
  call.src = src.get<int32_t>();
  call.dst = dst.get<int32_t>();
  call.weighted = c.plan.weighted;
  if (c.plan.gate) {
    call.gate_a = a.emplace(c.plan.gate->a).get<float>();
    call.gate_b = b.emplace(c.plan.gate->b).get<float>();
    call.gate_weight = weight.emplace(c.plan.gate->weight).get<float>();
    call.gate_bias = bias.emplace(c.plan.gate->bias).get<float>();
    call.gate_eps = float(c.plan.gate->eps);
  }
  call.batch = int(batch);
  call.tokens = int(c.x.size(1));
  call.kept = int(kept);
  call.merged = int(merged);
  call.channels = int(channels);
  call.d_out = d_out.get<float>();
  call.d_x = d_x.get<float>();
  call.d_branch = wanted.branch ? d_branch.get() : nullptr;
  call.branch_scale = wanted.scale ? scale.get<float>() : nullptr;
  call.compute = compute;
  call.d_gate = wanted.gate ? d_gate.get<float>() : nullptr;
  kernels::cuda::merge_backward(call, nullptr);
  return {d_x.cpu(), d_branch.cpu(), c.plan.gate && wanted.gate ? d_gate.cpu() : at::Tensor()};
}

/// d_x, and of each image the gradients of the gate as rows of R + 3C, by autograd in double.
Result expected_of(const Case& c) {
  const auto leaf = [](const at::Tensor& t) { return t.detach().to(at::kDouble).requires_grad_(); };
  const at::Tensor x = leaf(c.x);
  MergeArguments plan = c.plan;
  if (!plan.gate || plan.src.size(1) == 0) {
    plan.gate.reset();
    const auto out = kernels::merge_tokens_reference(x, c.sizes.to(at::kDouble), plan);
    const at::Tensor none = c.plan.gate ? at::zeros({c.x.size(0), 3 * c.x.size(2)}, at::kDouble) : at::Tensor();
    return {gradients_of(out.tokens, c.d_out.to(at::kDouble), {x})[0], at::Tensor(), none};
  }
  std::vector<at::Tensor> d_x, d_gate;
  for (int64_t i = 0; i < c.x.size(0); ++i) {
    const MergeGate& g = *c.plan.gate;
    plan.gate = MergeGate{leaf(g.a), leaf(g.b), leaf(g.weight), leaf(g.bias), g.eps};
    plan.keep = c.plan.keep.narrow(0, i, 1);
    plan.src = c.plan.src.narrow(0, i, 1);
    plan.dst = c.plan.dst.narrow(0, i, 1);
    const auto out = kernels::merge_tokens_reference(x.narrow(0, i, 1), c.sizes.narrow(0, i, 1).to(at::kDouble), plan);
    const auto found = gradients_of(out.tokens, c.d_out.narrow(0, i, 1).to(at::kDouble),
                                    {x, plan.gate->a, plan.gate->b, plan.gate->weight, plan.gate->bias});
    d_x.push_back(found[0].narrow(0, i, 1));
    std::vector<at::Tensor> row;
    for (size_t part = 1; part < found.size(); ++part) row.push_back(found[part].reshape({-1}));
    d_gate.push_back(at::cat(row));
  }
  return {at::cat(d_x), at::Tensor(), at::stack(d_gate)};
}

/// Of the largest element. d_x and the gate's gradients are fp32 whatever is computed in, d_branch rounds them once.
constexpr double kExact = 1e-5;
double branch_limit(DType dtype) {
  return dtype == DType::fp32 ? kExact : dtype == DType::bf16 ? 5e-3 : 6e-4;
}

}  // namespace

TEST_CASE("cuda merge's way back equals autograd", "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  const auto& variant = GENERATE(from_range(std::begin(kVariants), std::end(kVariants)));
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  CAPTURE(variant.name, shape.batch, shape.tokens, shape.kept, shape.merged, shape.channels);
  const Case c = make(shape, variant);
  const Result expected = expected_of(c);
  const at::Tensor branch = expected.x * c.branch_scale.to(at::kDouble).view({-1, 1, 1});
  for (const DType type : kTypes) {
    CAPTURE(int(type));
    const Result got = run(c, type);
    CHECK(relative_difference(got.x, expected.x) < kExact);
    CHECK(relative_difference(got.branch, branch) < branch_limit(type));
    // What is rounded is the fp32 product, once.
    CHECK(at::equal(got.branch, (got.x * c.branch_scale.view({-1, 1, 1})).to(scalar_type(type))));
    CHECK(got.equals(run(c, type)));
    if (!c.plan.gate) continue;
    // Each of the four by its own largest element.
    const std::vector<int64_t> parts{shape.merged, shape.channels, shape.channels, shape.channels};
    const auto found = got.gate.split_with_sizes(parts, 1), truth = expected.gate.split_with_sizes(parts, 1);
    for (size_t part = 0; part < parts.size(); ++part) {
      CAPTURE(part);
      if (shape.merged == 0) {
        CHECK(at::equal(found[part], at::zeros_like(found[part])));
      } else {
        CHECK(relative_difference(found[part], truth[part]) < kExact);
      }
    }
  }
}

TEST_CASE("cuda merge's way back equals the CPU's", "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  const auto& variant = GENERATE(from_range(std::begin(kVariants), std::end(kVariants)));
  CAPTURE(variant.name);
  Case c = make({4, 197, 157, 40, 384}, variant);
  const Result got = run(c, DType::fp32);
  c.x.requires_grad_();
  std::vector<at::Tensor> leaves{c.x};
  if (c.plan.gate) {
    const MergeGate& g = *c.plan.gate;
    for (const at::Tensor& t : {g.a, g.b, g.weight, g.bias}) leaves.push_back(t.requires_grad_());
  }
  const auto expected = gradients_of(kernels::merge_tokens(c.x, c.sizes, c.plan).tokens, c.d_out, leaves);
  CHECK(relative_difference(got.x, expected[0]) < kExact);
  if (!c.plan.gate) return;
  const auto summed = got.gate.sum(0).split_with_sizes({40, 384, 384, 384});
  for (size_t part = 0; part < summed.size(); ++part) {
    CAPTURE(part);
    CHECK(relative_difference(summed[part], expected[part + 1].reshape({-1})) < kExact);
  }
}

TEST_CASE("a token that takes no part in cuda merging gets its gradient bit for bit, a dropped one 0",
          "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  const auto& variant = GENERATE(from_range(std::begin(kVariants), std::end(kVariants)));
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  CAPTURE(variant.name, shape.tokens, shape.kept, shape.merged, shape.channels);
  const Case c = make(shape, variant);
  const Result got = run(c, DType::bf16);
  for (int64_t i = 0; i < std::min<int64_t>(shape.batch, 3); ++i) {
    at::Tensor dropped = at::ones({shape.tokens}, at::kBool);
    dropped.index_fill_(0, c.plan.keep[i], false).index_fill_(0, c.plan.src[i], false);
    const at::Tensor zeros = got.x[i].index({dropped});
    CHECK(at::equal(zeros, at::zeros_like(zeros)));
    CHECK((got.branch[i].index({dropped}) == 0).all().item<bool>());
    for (int64_t k = 0; k < shape.kept; ++k) {
      if ((c.plan.dst[i] == k).any().item<bool>()) continue;
      CHECK(at::equal(got.x[i][c.plan.keep[i][k].item<int64_t>()], c.d_out[i][k]));
    }
  }
}

TEST_CASE("d_x of a cuda gate with b = 0 is ToMe's, bit for bit", "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  Case c = make({3, 197, 157, 40, 192}, kVariants[1]);
  c.plan.gate->b.zero_();
  const Result gated = run(c, DType::fp32);
  c.plan.gate.reset();
  const Result plain = run(c, DType::fp32);
  // dw1 is 0 for w2 is; what is added is a 0.
  CHECK(at::equal(gated.x, plain.x));
  CHECK(at::equal(gated.branch, plain.branch));
}

TEST_CASE("an image's way back through a cuda merge does not depend on its batch mates", "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  const auto& variant = GENERATE(from_range(std::begin(kVariants), std::end(kVariants)));
  const auto& channels = GENERATE(200, 768);
  CAPTURE(variant.name, channels);
  // From as many blocks an image as there can be to one.
  const Case c = make({150, 65, 45, 17, channels}, variant);
  const Result all = run(c, DType::bf16);
  for (const int64_t count : {1, 9, 32, 70, 140}) {
    CAPTURE(count);
    const at::Tensor some = 149 - at::arange(count);
    CHECK(all.images(some).equals(run(images(c, some), DType::bf16)));
  }
}

TEST_CASE("cuda merge's way back without what may be left out", "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  Case c = make({3, 33, 20, 9, 384}, kVariants[1]);
  const Result all = run(c, DType::bf16);
  const Result bare = run(c, DType::bf16, {.branch = false, .gate = false});
  CHECK(at::equal(bare.x, all.x));
  CHECK(at::isnan(bare.branch).all().item<bool>());
  const Result unscaled = run(c, DType::bf16, {.scale = false});
  CHECK(at::equal(unscaled.x, all.x));
  CHECK(at::equal(unscaled.branch, all.x.to(at::kBFloat16)));
  c.sizes.fill_(1);
  CHECK(run(c, DType::bf16).equals(run(c, DType::bf16, {.sizes = false})));
}

TEST_CASE("cuda merge gives what the norm's way back needs", "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  const auto type = GENERATE(DType::fp32, DType::bf16, DType::fp16);
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  CAPTURE(int(type), shape.batch, shape.tokens, shape.channels);
  const Case c = make(shape, kVariants[0]);
  const OnDevice x(c.x), sizes(c.sizes), keep(c.plan.keep.to(at::kInt)), src(c.plan.src.to(at::kInt)),
      dst(c.plan.dst.to(at::kInt)), weight(seeded({shape.channels}, 8, 0.3) + 1), bias(seeded({shape.channels}, 9));
  struct Forward {
    at::Tensor x, y, normalised, inverse;
  };
  const auto forward = [&](bool training) {
    const OnDevice x_out(c.d_out.sizes(), at::kFloat), sizes_out({shape.batch, shape.kept}, at::kFloat),
        y(c.d_out.sizes(), scalar_type(type)), normalised(c.d_out.sizes(), scalar_type(type)),
        inverse({shape.batch, shape.kept}, at::kFloat);
    MergeCall call;
    call.x = x.get();
    call.sizes = sizes.get<float>();
    call.keep = keep.get<int32_t>();
    call.src = src.get<int32_t>();
    call.dst = dst.get<int32_t>();
    call.batch = int(shape.batch);
    call.tokens = int(shape.tokens);
    call.kept = int(shape.kept);
    call.merged = int(shape.merged);
    call.channels = int(shape.channels);
    call.compute = type;
    call.x_out = x_out.get();
    call.sizes_out = sizes_out.get<float>();
    call.norm_weight = weight.get<float>();
    call.norm_bias = bias.get<float>();
    call.y = y.get();
    call.normalised = training ? normalised.get() : nullptr;
    call.inverse_deviation = training ? inverse.get<float>() : nullptr;
    kernels::cuda::merge_tokens(call, nullptr);
    return Forward{x_out.cpu(), y.cpu(), normalised.cpu(), inverse.cpu()};
  };
  const Forward got = forward(true), plain = forward(false);
  CHECK(at::equal(got.x, plain.x));
  CHECK(at::equal(got.y, plain.y));
  const at::Tensor wide = got.x.to(at::kDouble), centred = wide - wide.mean(-1, true);
  const at::Tensor inverse = (centred.square().mean(-1, true) + 1e-6).rsqrt();
  CHECK(relative_difference(got.inverse, inverse.squeeze(-1)) < kExact);
  CHECK(relative_difference(got.normalised, centred * inverse) < branch_limit(type));
}

TEST_CASE("cuda merge's way back refuses calls it cannot serve", "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  const OnDevice some(at::zeros({256}));
  MergeBackwardCall call;
  call.x = call.d_out = some.get<float>();
  call.d_x = some.get<float>() + 128;
  call.keep = call.src = call.dst = some.get<int32_t>();
  call.batch = 1;
  call.tokens = 4;
  call.kept = 3;
  call.merged = 1;
  call.channels = 16;
  const auto attempt = [&] { kernels::cuda::merge_backward(call, nullptr); };
  SECTION("null") {
    call.d_out = nullptr;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("d_out is null"));
  }
  SECTION("no plan") {
    call.dst = nullptr;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("dst"));
  }
  SECTION("alignment") {
    call.d_x += 1;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("d_x is not aligned"));
  }
  SECTION("more tokens out than in") {
    call.merged = 2;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("2 merged"));
  }
  SECTION("channels") {
    call.channels = 20;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("20 channels"));
  }
  SECTION("rows too wide") {
    call.channels = 1544;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("1544 channels"));
  }
  SECTION("half a gate") {
    call.gate_a = some.get<float>();
    CHECK_THROWS_WITH(attempt(), Catch::Contains("gate_b"));
  }
  SECTION("no images") {
    call.batch = 0;
    CHECK_NOTHROW(attempt());
  }
}
