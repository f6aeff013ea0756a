#include "kernels/merge.h"

#include "base/error.h"
#include "kernels/match.h"
#include "support.h"

using namespace pyra;
using kernels::MergeArguments;
using kernels::MergeGate;
using test::max_difference;

namespace {

struct Case {
  at::Tensor x, sizes;
  MergeArguments arguments;
};

class Random {
 public:
  explicit Random(uint64_t seed) : generator_(at::detail::createCPUGenerator(seed)) {}
  at::Tensor normal(at::IntArrayRef shape) {
    return at::randn(shape, generator_, at::TensorOptions().dtype(at::kFloat));
  }
  at::Tensor sizes(at::IntArrayRef shape) {
    return at::randint(1, 6, shape, generator_, at::TensorOptions().dtype(at::kFloat));
  }
  at::Generator& generator() { return generator_; }

 private:
  at::Generator generator_;
};

/// A random plan: `kept` tokens stay (the class token first), `merged` go to random ones, the rest are dropped.
Case random_case(int64_t batch, int64_t tokens, int64_t kept, int64_t merged, int64_t width, uint64_t seed) {
  Random random(seed);
  auto order = at::empty({batch, tokens}, at::kLong);
  for (int64_t i = 0; i < batch; ++i) {
    order[i][0] = 0;
    order[i].slice(0, 1) = at::randperm(tokens - 1, random.generator(), at::kLong) + 1;
  }
  Case c{random.normal({batch, tokens, width}), random.sizes({batch, tokens}), {}};
  c.arguments.keep = order.slice(1, 0, kept).contiguous();
  c.arguments.src = order.slice(1, kept, kept + merged).contiguous();
  c.arguments.dst = at::randint(0, kept, {batch, merged}, random.generator(), at::kLong);
  return c;
}

MergeGate random_gate(int64_t merged, int64_t width, uint64_t seed) {
  Random random(seed);
  return {.a = random.normal({merged, 1}),
          .b = random.normal({1, width}) * 0.2,
          .weight = 1 + random.normal({width}) * 0.3,
          .bias = random.normal({width}) * 0.3,
          .eps = 1e-5};
}

/// The leaves that may require gradients, in a fixed order; undefined ones left out.
std::vector<at::Tensor> leaves(const Case& c) {
  std::vector<at::Tensor> all{c.x};
  if (c.arguments.src_weight.defined()) all.push_back(c.arguments.src_weight);
  if (c.arguments.gate) {
    const MergeGate& gate = *c.arguments.gate;
    all.insert(all.end(), {gate.a, gate.b, gate.weight, gate.bias});
  }
  return all;
}

Case in_double(const Case& c) {
  const auto wide = [](const at::Tensor& t) { return t.defined() ? t.detach().to(at::kDouble) : t; };
  Case d{wide(c.x), wide(c.sizes), c.arguments};
  d.arguments.src_weight = wide(c.arguments.src_weight);
  d.arguments.src_size_scale = wide(c.arguments.src_size_scale);
  if (c.arguments.gate) {
    const MergeGate& gate = *c.arguments.gate;
    d.arguments.gate = MergeGate{wide(gate.a), wide(gate.b), wide(gate.weight), wide(gate.bias), gate.eps};
  }
  return d;
}

std::vector<at::Tensor> gradients(const std::vector<at::Tensor>& inputs, const at::Tensor& out,
                                  const at::Tensor& given) {
  std::vector<at::Tensor> result;
  for (const auto& input : inputs) input.mutable_grad() = at::Tensor();
  out.backward(given);
  for (const auto& input : inputs) result.push_back(input.grad());
  return result;
}

struct Variant {
  const char* name;
  bool weighted, gate, src_weight, size_scale;
};

const Variant kVariants[] = {{"ToMe", true, false, false, false},
                             {"PYRA", true, true, false, false},
                             {"DiffRate", false, false, false, true},
                             {"learned weights", true, false, true, false},
                             {"learned weights, mean", false, false, true, true},
                             {"gate and weights", true, true, true, true},
                             {"gate, mean", false, true, true, false}};

struct Shape {
  int64_t batch, tokens, kept, merged, width;
};

const Shape kShapes[] = {{1, 2, 2, 0, 8},   {1, 2, 1, 1, 16},    {2, 3, 2, 1, 5},       {3, 17, 12, 5, 33},
                         {2, 17, 9, 3, 16}, {3, 65, 49, 16, 64}, {2, 101, 80, 21, 192}, {1, 20, 1, 19, 48}};

Case make(const Shape& s, const Variant& v) {
  Case c = random_case(s.batch, s.tokens, s.kept, s.merged, s.width, uint64_t(s.tokens + s.width));
  Random random(99);
  c.arguments.weighted = v.weighted;
  if (v.gate) c.arguments.gate = random_gate(s.merged, s.width, 5);
  if (v.src_weight) c.arguments.src_weight = at::sigmoid(random.normal({s.batch, s.merged}));
  if (v.size_scale) c.arguments.src_size_scale = at::tanh(random.normal({s.batch, s.merged}));
  return c;
}

}  // namespace

TEST_CASE("merge_tokens equals the reference, forward and backward", "[merge]") {
  const auto& variant = GENERATE(from_range(std::begin(kVariants), std::end(kVariants)));
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  CAPTURE(variant.name, shape.batch, shape.tokens, shape.kept, shape.merged, shape.width);
  Case c = make(shape, variant);
  Case d = in_double(c);
  const auto plain = kernels::merge_tokens(c.x, c.sizes, c.arguments);
  CHECK_FALSE(plain.tokens.requires_grad());
  for (const auto& leaf : leaves(c)) leaf.requires_grad_();
  for (const auto& leaf : leaves(d)) leaf.requires_grad_();
  const auto got = kernels::merge_tokens(c.x, c.sizes, c.arguments);
  const auto expected = kernels::merge_tokens_reference(d.x, d.sizes, d.arguments);
  CHECK(at::equal(plain.tokens, got.tokens));
  CHECK(max_difference(got.tokens, expected.tokens) < 1e-5);
  CHECK(max_difference(got.sizes, expected.sizes) < 1e-5);
  CHECK_FALSE(got.sizes.requires_grad());

  const auto given = Random(4).normal(got.tokens.sizes());
  const auto got_gradients = gradients(leaves(c), got.tokens, given);
  const auto expected_gradients = gradients(leaves(d), expected.tokens, given.to(at::kDouble));
  for (size_t i = 0; i < got_gradients.size(); ++i) {
    CAPTURE(i);
    const auto& truth = expected_gradients[i];
    // A gate without rows takes no part; the reference may return zeros for it.
    if (shape.merged == 0 && i > 0) continue;
    const double largest = std::max(1e-3, truth.abs().max().item<double>());
    CHECK(max_difference(got_gradients[i], truth) < 1e-5 * largest);
  }
}

TEST_CASE("the reference's gradients are those of finite differences", "[merge]") {
  Case d = in_double(make({2, 9, 5, 3, 6}, {"all", true, true, true, true}));
  const auto given = Random(8).normal({2, 5, 6}).to(at::kDouble);
  for (const auto& leaf : leaves(d)) leaf.requires_grad_();
  const auto analytic = gradients(leaves(d), kernels::merge_tokens_reference(d.x, d.sizes, d.arguments).tokens, given);
  const at::NoGradGuard no_grad;
  const auto value = [&] {
    return (kernels::merge_tokens_reference(d.x, d.sizes, d.arguments).tokens * given).sum().item<double>();
  };
  constexpr double kStep = 1e-6;
  const auto all = leaves(d);
  for (size_t leaf = 0; leaf < all.size(); ++leaf) {
    const auto flat = all[leaf].view(-1);
    double worst = 0;
    for (int64_t i = 0; i < flat.numel(); ++i) {
      const double old = flat[i].item<double>();
      flat[i] = old + kStep;
      const double above = value();
      flat[i] = old - kStep;
      const double below = value();
      flat[i] = old;
      worst = std::max(worst, std::abs((above - below) / (2 * kStep) - analytic[leaf].view(-1)[i].item<double>()));
    }
    CAPTURE(leaf);
    CHECK(worst < 1e-6);
  }
}

TEST_CASE("a gate with b = 0 is ToMe, bit for bit", "[merge]") {
  Case c = make({3, 197, 157, 40, 192}, {"PYRA", true, true, false, false});
  c.arguments.gate->b.zero_();
  const auto gated = kernels::merge_tokens(c.x, c.sizes, c.arguments);
  c.arguments.gate.reset();
  CHECK(at::equal(gated.tokens, kernels::merge_tokens(c.x, c.sizes, c.arguments).tokens));
}

TEST_CASE("merging keeps the weighted sum of an image and the sum of its sizes", "[merge]") {
  const Case c = make({4, 65, 40, 25, 32}, {"ToMe", true, false, false, false});
  const auto merged = kernels::merge_tokens(c.x, c.sizes, c.arguments);
  CHECK(at::equal(merged.sizes.sum(1), c.sizes.sum(1)));
  const auto before = (c.x * c.sizes.unsqueeze(-1)).sum(1), after = (merged.tokens * merged.sizes.unsqueeze(-1)).sum(1);
  CHECK(max_difference(before, after) < 1e-3);
}

TEST_CASE("an image's merge does not depend on its batch mates", "[merge]") {
  const auto& variant = GENERATE(from_range(std::begin(kVariants), std::end(kVariants)));
  CAPTURE(variant.name);
  Case c = make({5, 65, 40, 20, 48}, variant);
  c.x.requires_grad_();
  const auto given = Random(4).normal({5, 40, 48});
  const auto all = kernels::merge_tokens(c.x, c.sizes, c.arguments);
  const auto all_gradient = gradients({c.x}, all.tokens, given)[0];
  for (int64_t i = 0; i < 5; ++i) {
    const auto pick = [i](const at::Tensor& t) { return t.defined() ? t.detach().narrow(0, i, 1) : t; };
    Case one{pick(c.x).clone().requires_grad_(), pick(c.sizes), c.arguments};
    for (auto* t : {&one.arguments.keep, &one.arguments.src, &one.arguments.dst, &one.arguments.src_weight,
                    &one.arguments.src_size_scale}) {
      *t = pick(*t);
    }
    const auto got = kernels::merge_tokens(one.x, one.sizes, one.arguments);
    CHECK(at::equal(got.tokens, pick(all.tokens)));
    CHECK(at::equal(got.sizes, pick(all.sizes)));
    CHECK(at::equal(gradients({one.x}, got.tokens, given.narrow(0, i, 1))[0], all_gradient.narrow(0, i, 1)));
  }
}

TEST_CASE("only what requires gradients gets them", "[merge]") {
  Case c = make({2, 17, 12, 5, 16}, {"PYRA", true, true, true, false});
  MergeGate& gate = *c.arguments.gate;
  const auto backward = [&] { kernels::merge_tokens(c.x, c.sizes, c.arguments).tokens.sum().backward(); };
  SECTION("the gate alone") {
    gate.a.requires_grad_();
    gate.b.requires_grad_();
    backward();
    CHECK(gate.a.grad().defined());
    CHECK(gate.b.grad().defined());
    CHECK_FALSE(c.x.grad().defined());
    CHECK_FALSE(gate.weight.grad().defined());
    CHECK_FALSE(c.arguments.src_weight.grad().defined());
  }
  SECTION("the weights of the sources alone") {
    c.arguments.src_weight.requires_grad_();
    backward();
    CHECK(c.arguments.src_weight.grad().defined());
    CHECK_FALSE(gate.a.grad().defined());
  }
  SECTION("none where recording is off") {
    c.x.requires_grad_();
    const at::NoGradGuard no_grad;
    CHECK_FALSE(kernels::merge_tokens(c.x, c.sizes, c.arguments).tokens.requires_grad());
  }
}

TEST_CASE("check_merge finds each way to be wrong", "[merge]") {
  const Case good = make({3, 17, 12, 4, 8}, {"all", true, true, true, true});
  const auto check = [](const MergeArguments& arguments) { return kernels::check_merge(arguments, 3, 17, 12, 1); };
  CHECK(check(good.arguments).empty());
  struct Wrong {
    const char* part;
    std::function<void(MergeArguments&)> spoil;
  };
  const Wrong wrongs[] = {
      {"keep is undefined", [](auto& p) { p.keep.reset(); }},
      {"keep is Int", [](auto& p) { p.keep = p.keep.to(at::kInt); }},
      {"expected Long [3, 12]", [](auto& p) { p.keep = p.keep.slice(1, 0, 11); }},
      {"keep is Long [3, 12] not on the CPU", [](auto& p) { p.keep = p.keep.to(at::kMeta); }},
      {"src is undefined", [](auto& p) { p.src.reset(); }},
      {"dst is Long [3, 3]", [](auto& p) { p.dst = p.dst.slice(1, 0, 3); }},
      {"image 1: keep[5] is 17", [](auto& p) { p.keep[1][5] = 17; }},
      {"image 2: keep[11] is -1", [](auto& p) { p.keep[2][11] = -1; }},
      {"image 0: keep[2] names token", [](auto& p) { p.keep[0][2] = p.keep[0][1]; }},
      {"image 0: keep[0] is 3; protected token 0", [](auto& p) { p.keep[0][0] = 3; }},
      {"image 1: src[3] is 99", [](auto& p) { p.src[1][3] = 99; }},
      {"image 1: src[0] names token", [](auto& p) { p.src[1][0] = p.keep[1][4]; }},
      {"image 2: src[1] names token", [](auto& p) { p.src[2][1] = p.src[2][0]; }},
      {"image 0: dst[2] is 12", [](auto& p) { p.dst[0][2] = 12; }},
      {"image 2: dst[0] is -4", [](auto& p) { p.dst[2][0] = -4; }},
      {"src_weight is Double", [](auto& p) { p.src_weight = p.src_weight.to(at::kDouble); }},
      {"src_size_scale is Float [3]", [](auto& p) { p.src_size_scale = p.src_size_scale.select(1, 0); }},
      {"gate.a is Float [4]", [](auto& p) { p.gate->a = p.gate->a.view(-1); }},
      {"gate.b is undefined", [](auto& p) { p.gate->b.reset(); }},
      {"gate.weight is Float [7]", [](auto& p) { p.gate->weight = p.gate->weight.slice(0, 1); }},
      {"gate.bias is undefined", [](auto& p) { p.gate->bias.reset(); }},
      {"gate.eps is 0", [](auto& p) { p.gate->eps = 0; }},
  };
  for (const Wrong& wrong : wrongs) {
    MergeArguments arguments = good.arguments;
    for (auto* t : {&arguments.keep, &arguments.src, &arguments.dst}) *t = t->clone();
    wrong.spoil(arguments);
    CAPTURE(wrong.part);
    CHECK_THAT(check(arguments), Catch::Contains(wrong.part));
  }
}

TEST_CASE("merge_tokens refuses tensors of other kinds", "[merge]") {
  Case c = make({2, 17, 12, 5, 16}, {"PYRA", true, true, false, false});
  CHECK_THROWS_AS(kernels::merge_tokens(c.x.to(at::kDouble), c.sizes, c.arguments), Error);
  CHECK_THROWS_AS(kernels::merge_tokens(c.x.to(at::kMeta), c.sizes, c.arguments), Error);
  CHECK_THROWS_AS(kernels::merge_tokens(c.x, c.sizes.slice(1, 1), c.arguments), Error);
  c.arguments.gate = random_gate(5, 8, 1);
  CHECK_THROWS_AS(kernels::merge_tokens(c.x, c.sizes, c.arguments), Error);
}

TEST_CASE("a size does not shrink by a factor below nought, and keeps its logarithm", "[merge]") {
  Case c = make({2, 17, 9, 3, 16}, {"a cosine", false, false, false, true});
  c.arguments.src_size_scale.fill_(-1);
  const kernels::Merged merged = kernels::merge_tokens(c.x, c.sizes, c.arguments);
  CHECK(at::equal(merged.sizes, c.sizes.gather(1, c.arguments.keep)));
}
