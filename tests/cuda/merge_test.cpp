#include "kernels/merge.h"

#include <optional>

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/cuda/merge.h"
#include "kernels/layer_norm.h"
#include "kernels/tensors.h"

using namespace pyra;
using namespace pyra::test;
using kernels::MergeArguments;
using kernels::MergeGate;
using kernels::cuda::DType;
using kernels::cuda::MergeCall;

namespace {

struct Types {
  DType residual, compute;
};
const Types kTypes[] = {{DType::fp32, DType::fp32},
                        {DType::fp32, DType::bf16},
                        {DType::fp32, DType::fp16},
                        {DType::bf16, DType::bf16},
                        {DType::fp16, DType::fp16}};

struct Variant {
  const char* name;
  bool weighted, gate, src_weight, size_scale;
};
const Variant kVariants[] = {
    {"ToMe", true, false, false, false},          {"PYRA", true, true, false, false},
    {"DiffRate", false, false, false, true},      {"learned weights", true, false, true, false},
    {"gate and weights", true, true, true, true}, {"gate, mean", false, true, true, false}};

struct Sizes {
  int64_t batch, tokens, kept, merged, channels;
};
const Sizes kShapes[] = {{1, 1, 1, 0, 8},    {1, 2, 2, 0, 64},        {2, 2, 1, 1, 192},      {3, 17, 12, 5, 200},
                         {2, 17, 9, 3, 384}, {3, 197, 157, 40, 768},  {2, 101, 80, 21, 1024}, {1, 60, 1, 59, 1280},
                         {1, 9, 6, 3, 4096}, {2, 300, 170, 130, 264}, {140, 20, 12, 8, 1280}, {140, 9, 6, 3, 4096}};

struct Case {
  at::Tensor x, sizes, norm_weight, norm_bias;
  MergeArguments plan;
};

/// A random plan: `kept` tokens stay, `merged` go to random ones, the rest are dropped.
Case make(const Sizes& s, const Variant& v, DType residual) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t(s.tokens + s.channels));
  std::vector<at::Tensor> orders;
  for (int64_t i = 0; i < s.batch; ++i) orders.push_back(at::randperm(s.tokens, generator, at::kLong));
  const at::Tensor order = at::stack(orders);
  Case c;
  // Values that the stream can hold: the reference sees what the kernel sees.
  c.x = seeded({s.batch, s.tokens, s.channels}, 1).to(scalar_type(residual)).to(at::kFloat);
  c.sizes = at::randint(1, 6, {s.batch, s.tokens}, generator, at::kFloat);
  c.norm_weight = seeded({s.channels}, 2, 0.3) + 1;
  c.norm_bias = seeded({s.channels}, 3);
  c.plan.keep = order.slice(1, 0, s.kept).contiguous();
  c.plan.src = order.slice(1, s.kept, s.kept + s.merged).contiguous();
  c.plan.dst = at::randint(0, s.kept, {s.batch, s.merged}, generator, at::kLong);
  c.plan.weighted = v.weighted;
  if (v.gate && s.merged > 0)
    c.plan.gate = MergeGate{.a = seeded({s.merged, 1}, 4),
                            .b = seeded({1, s.channels}, 5, 0.1),
                            .weight = seeded({s.channels}, 6, 0.3) + 1,
                            .bias = seeded({s.channels}, 7, 0.3),
                            .eps = 1e-5};
  if (v.src_weight) c.plan.src_weight = at::sigmoid(seeded({s.batch, s.merged}, 8));
  if (v.size_scale) c.plan.src_size_scale = at::tanh(seeded({s.batch, s.merged}, 9));
  return c;
}

struct Result {
  at::Tensor x, sizes, y;
  [[nodiscard]] bool equals(const Result& o) const {
    return at::equal(x, o.x) && at::equal(sizes, o.sizes) && at::equal(y, o.y);
  }
  [[nodiscard]] Result images(const at::Tensor& which) const {
    return {x.index_select(0, which), sizes.index_select(0, which), y.index_select(0, which)};
  }
};

Case images(const Case& c, const at::Tensor& which) {
  Case out = c;
  for (at::Tensor* t : {&out.x, &out.sizes, &out.plan.keep, &out.plan.src, &out.plan.dst, &out.plan.src_weight,
                        &out.plan.src_size_scale}) {
    if (t->defined()) *t = t->index_select(0, which);
  }
  return out;
}

/// The device's copy of a tensor that may be missing.
const float* floats(std::optional<OnDevice>& memory, const at::Tensor& tensor) {
  if (!tensor.defined()) return nullptr;
  memory.emplace(tensor);
  return memory->get<float>();
}

Result run(const Case& c, const Types& types) {
  const int64_t batch = c.x.size(0), kept = c.plan.keep.size(1), merged = c.plan.src.size(1), channels = c.x.size(2);
  const OnDevice x(c.x.to(scalar_type(types.residual))), sizes(c.sizes), keep(c.plan.keep.to(at::kInt)),
      src(c.plan.src.to(at::kInt)), dst(c.plan.dst.to(at::kInt)), weight(c.norm_weight), bias(c.norm_bias);
  const OnDevice x_out({batch, kept, channels}, scalar_type(types.residual)), sizes_out({batch, kept}, at::kFloat),
      y({batch, kept, channels}, scalar_type(types.compute));
  std::optional<OnDevice> a, b, gate_weight, gate_bias, src_weight, size_scale;
  MergeCall call;
  call.x = x.get();
  call.sizes = sizes.get<float>();
  call.keep = keep.get<int32_t>();
  call.src = src.get<int32_t>();
  call.dst = dst.get<int32_t>();
  call.src_weight = floats(src_weight, c.plan.src_weight);
  call.src_size_scale = floats(size_scale, c.plan.src_size_scale);
  call.weighted = c.plan.weighted;
  if (c.plan.gate) {
    call.gate_a = floats(a, c.plan.gate->a);
    call.gate_b = floats(b, c.plan.gate->b);
    call.gate_weight = floats(gate_weight, c.plan.gate->weight);
    call.gate_bias = floats(gate_bias, c.plan.gate->bias);
    call.gate_eps = float(c.plan.gate->eps);
  }
  call.batch = int(batch);
  call.tokens = int(c.x.size(1));
  call.kept = int(kept);
  call.merged = int(merged);
  call.channels = int(channels);
  call.residual = types.residual;
  call.compute = types.compute;
  call.x_out = x_out.get();
  call.sizes_out = sizes_out.get<float>();
  call.norm_weight = weight.get<float>();
  call.norm_bias = bias.get<float>();
  call.y = y.get();
  kernels::cuda::merge_tokens(call, nullptr);
  return {x_out.cpu(), sizes_out.cpu(), y.cpu()};
}

Case in_double(const Case& c) {
  const auto wide = [](const at::Tensor& t) { return t.defined() ? t.to(at::kDouble) : t; };
  Case d{wide(c.x), wide(c.sizes), wide(c.norm_weight), wide(c.norm_bias), c.plan};
  d.plan.src_weight = wide(c.plan.src_weight);
  d.plan.src_size_scale = wide(c.plan.src_size_scale);
  if (c.plan.gate) {
    const MergeGate& g = *c.plan.gate;
    d.plan.gate = MergeGate{wide(g.a), wide(g.b), wide(g.weight), wide(g.bias), g.eps};
  }
  return d;
}

}  // namespace

TEST_CASE("cuda merge equals the reference", "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  const auto& types = GENERATE(from_range(std::begin(kTypes), std::end(kTypes)));
  const auto& variant = GENERATE(from_range(std::begin(kVariants), std::end(kVariants)));
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  CAPTURE(int(types.residual), int(types.compute), variant.name, shape.batch, shape.tokens, shape.kept, shape.merged,
          shape.channels);
  const Case c = make(shape, variant, types.residual), d = in_double(c);
  const auto expected = kernels::merge_tokens_reference(d.x, d.sizes, d.plan);
  const at::Tensor y = kernels::layer_norm_reference(expected.tokens.view({-1, shape.channels}), d.norm_weight,
                                                     d.norm_bias, 1e-6, at::kDouble);
  const Result got = run(c, types);
  CHECK(relative_difference(got.x, expected.tokens) < rounding_limit(types.residual, 2e-5));
  CHECK(relative_difference(got.sizes, expected.sizes) < 1e-6);
  CHECK(relative_difference(got.y.view({-1, shape.channels}), y) < rounding_limit(types.compute, 2e-5));
}

TEST_CASE("cuda merge copies tokens that receive none, bit for bit", "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  const auto& types = GENERATE(from_range(std::begin(kTypes), std::end(kTypes)));
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  CAPTURE(int(types.residual), int(types.compute), shape.tokens, shape.channels);
  const Case c = make(shape, kVariants[1], types.residual);
  const Result got = run(c, types);
  for (int64_t i = 0; i < shape.batch; ++i) {
    for (int64_t k = 0; k < shape.kept; ++k) {
      if ((c.plan.dst[i] == k).any().item<bool>()) continue;
      const at::Tensor token = c.x[i][c.plan.keep[i][k].item<int64_t>()];
      CHECK(at::equal(got.x[i][k], token.to(scalar_type(types.residual))));
    }
  }
}

TEST_CASE("a cuda gate with b = 0 is ToMe, bit for bit", "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  const auto& types = GENERATE(from_range(std::begin(kTypes), std::end(kTypes)));
  CAPTURE(int(types.residual), int(types.compute));
  Case c = make({3, 197, 157, 40, 192}, kVariants[1], types.residual);
  c.plan.gate->b.zero_();
  const Result gated = run(c, types);
  c.plan.gate.reset();
  CHECK(gated.equals(run(c, types)));
}

TEST_CASE("an image's cuda merge does not depend on its batch mates", "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  const auto& types = GENERATE(from_range(std::begin(kTypes), std::end(kTypes)));
  const auto& variant = GENERATE(from_range(std::begin(kVariants), std::end(kVariants)));
  CAPTURE(int(types.residual), int(types.compute), variant.name);
  // Large enough that an image is cut into fewer slices than it is alone.
  const int64_t batch = 70;
  const Case c = make({batch, 65, 45, 20, 384}, variant, types.residual);
  const Result all = run(c, types);
  CHECK(all.equals(run(c, types)));
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t(3));
  const at::Tensor order = at::randperm(batch, generator, at::kLong);
  CHECK(all.images(order).equals(run(images(c, order), types)));
  for (const int64_t i : {0, 33, 69}) {
    const at::Tensor one = at::full({1}, i, at::kLong);
    CHECK(all.images(one).equals(run(images(c, one), types)));
  }
}

TEST_CASE("an image's cuda merge does not depend on how many blocks share it", "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  // Batches that a large GPU gives lone blocks, several blocks an image and one; the pairs of the schedules of a ViT-B,
  // fewer pairs than blocks, odd numbers, and more than a round takes.
  const auto& shape = GENERATE(Sizes{300, 197, 157, 40, 768}, Sizes{300, 157, 123, 34, 768},
                               Sizes{300, 51, 37, 14, 768}, Sizes{300, 8, 5, 3, 768}, Sizes{300, 197, 181, 16, 768},
                               Sizes{300, 37, 36, 1, 768}, Sizes{300, 65, 40, 25, 1024}, Sizes{300, 90, 45, 45, 200},
                               Sizes{9, 66, 33, 33, 1280}, Sizes{9, 420, 200, 220, 768}, Sizes{60, 140, 70, 70, 1280});
  const auto& types = GENERATE(Types{DType::fp32, DType::bf16}, Types{DType::bf16, DType::bf16});
  CAPTURE(int(types.residual), shape.tokens, shape.kept, shape.merged, shape.channels);
  const Case c = make(shape, kVariants[1], types.residual);
  const Result all = run(c, types);
  for (const int64_t batch : {1, 3, 9, 40, 128}) {
    if (batch > shape.batch) continue;
    CAPTURE(batch);
    const at::Tensor last = at::arange(shape.batch - batch, shape.batch, at::kLong);
    CHECK(all.images(last).equals(run(images(c, last), types)));
  }
}

TEST_CASE("a cuda merge where all go to one token, or the last ones", "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  const int64_t first = GENERATE(0, 5, 122, 156);
  const int64_t batch = GENERATE(1, 3, 128);
  CAPTURE(first, batch);
  const Sizes shape{batch, 197, 157, 40, 768};
  const Types types{DType::fp32, DType::bf16};
  Case c = make(shape, kVariants[1], types.residual);
  c.plan.dst = c.plan.dst.remainder(157 - first).clamp_max(first == 5 ? 0 : 156) + first;
  const Case d = in_double(c);
  const auto expected = kernels::merge_tokens_reference(d.x, d.sizes, d.plan);
  const Result got = run(c, types);
  CHECK(relative_difference(got.x, expected.tokens) < rounding_limit(types.residual, 2e-5));
  CHECK(relative_difference(got.sizes, expected.sizes) < 1e-6);
}

TEST_CASE("cuda merge refuses calls it cannot serve", "[cuda][merge][gpu]") {
  PYRA_NEEDS_GPU();
  MergeCall call;
  call.batch = 1;
  call.tokens = 4;
  call.kept = 3;
  call.merged = 1;
  call.channels = 16;
  const auto attempt = [&] { kernels::cuda::merge_tokens(call, nullptr); };
  SECTION("null") {
    CHECK_THROWS_WITH(attempt(), Catch::Contains("x is null"));
  }
  SECTION("more tokens out than in") {
    call.merged = 2;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("2 are merged"));
  }
  SECTION("channels") {
    call.channels = 20;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("20 channels"));
  }
  SECTION("a narrow stream of another type") {
    call.residual = DType::bf16;
    call.compute = DType::fp32;
    CHECK_THROWS_WITH(attempt(), Catch::Contains("16 bits"));
  }
}
