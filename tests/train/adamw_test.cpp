#include "train/adamw.h"

#include <ATen/ATen.h>

#include <cmath>

#include "base/error.h"
#include "base/philox.h"
#include "catch.h"
#include "support.h"

using namespace pyra;
using train::AdamW;
using train::AdamWSettings;

namespace {

at::Tensor random(std::vector<int64_t> shape, uint64_t domain) {
  at::Tensor out = at::empty(shape, at::kFloat);
  const Philox generator(5, RandomStream::init, domain);
  float* data = out.data_ptr<float>();
  for (int64_t i = 0; i < out.numel(); ++i) data[i] = generator.normal(uint64_t(i));
  return out;
}

/// The same update written down in double.
struct Reference {
  at::Tensor value, first, second;
  explicit Reference(const at::Tensor& start)
      : value(start.to(at::kDouble)), first(at::zeros_like(value)), second(at::zeros_like(value)) {}
  void step(const at::Tensor& gradient, double lr, const AdamWSettings& s, int t) {
    const at::Tensor g = gradient.to(at::kDouble);
    first = s.beta1 * first + (1 - s.beta1) * g;
    second = s.beta2 * second + (1 - s.beta2) * g * g;
    const at::Tensor m = first / (1 - std::pow(s.beta1, t)), v = second / (1 - std::pow(s.beta2, t));
    value = value - lr * s.weight_decay * value - lr * m / (v.sqrt() + s.eps);
  }
};

}  // namespace

TEST_CASE("AdamW agrees with the update in double over 50 steps, each group at its own rate", "[adamw]") {
  const AdamWSettings settings{.beta1 = 0.8, .beta2 = 0.95, .eps = 1e-6, .weight_decay = 0.05};
  sdk::TensorMap tensors{{"head.weight", random({70000}, 1)}, {"merge.pyra.blocks.0.a", random({7, 3}, 2)}};
  for (auto& [name, tensor] : tensors) tensor.requires_grad_();
  Reference head(tensors["head.weight"].detach()), merge(tensors["merge.pyra.blocks.0.a"].detach());
  AdamW optimiser(tensors, settings);
  for (int t = 1; t <= 50; ++t) {
    const double lr = 0.01 / t, merge_lr = 0.1 / t;
    const at::Tensor head_gradient = random({70000}, 100 + t), merge_gradient = random({7, 3}, 200 + t);
    tensors["head.weight"].mutable_grad() = head_gradient;
    tensors["merge.pyra.blocks.0.a"].mutable_grad() = merge_gradient;
    optimiser.step(lr, merge_lr);
    head.step(head_gradient, lr, settings, t);
    merge.step(merge_gradient, merge_lr, settings, t);
  }
  CHECK(optimiser.steps() == 50);
  CHECK(test::max_difference(tensors["head.weight"], head.value) < 5e-6);
  CHECK(test::max_difference(tensors["merge.pyra.blocks.0.a"], merge.value) < 5e-6);
}

TEST_CASE("A tensor without a gradient stays as it is, and gradients are gone after a step", "[adamw]") {
  const at::Tensor trained = random({5}, 1).requires_grad_(), idle = random({5}, 2).requires_grad_();
  const at::Tensor before = idle.detach().clone();
  AdamW optimiser(sdk::TensorMap{{"a", trained}, {"b", idle}}, {.weight_decay = 0.5});
  trained.mutable_grad() = at::ones({5});
  optimiser.step(0.1, 0.1);
  CHECK(at::equal(idle.detach(), before));
  CHECK_FALSE(trained.grad().defined());
}

TEST_CASE("The gradient norm spans all tensors and shows what is not finite", "[adamw]") {
  const at::Tensor a = at::zeros({2}).requires_grad_(), b = at::zeros({1}).requires_grad_();
  AdamW optimiser(sdk::TensorMap{{"a", a}, {"b", b}}, {});
  CHECK(optimiser.gradient_norm() == 0);
  a.mutable_grad() = at::full({2}, 2.0f);
  b.mutable_grad() = at::full({1}, 1.0f);
  CHECK(optimiser.gradient_norm() == Approx(3));
  b.mutable_grad() = at::full({1}, std::nanf(""));
  CHECK(std::isnan(optimiser.gradient_norm()));
  a.mutable_grad() = at::full({2}, INFINITY);
  CHECK_FALSE(std::isfinite(optimiser.gradient_norm()));
}

TEST_CASE("AdamW takes contiguous fp32 only", "[adamw]") {
  CHECK_THROWS_AS(AdamW(sdk::TensorMap{{"a", at::zeros({2}, at::kDouble)}}, {}), Error);
  CHECK_THROWS_AS(AdamW(sdk::TensorMap{{"a", at::zeros({2, 3}).t()}}, {}), Error);
}
