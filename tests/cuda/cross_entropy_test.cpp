#include "kernels/cuda/cross_entropy.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "base/error.h"
#include "cuda/device.h"
#include "kernels/tensors.h"

using namespace pyra;
using namespace pyra::test;
using kernels::cuda::StepStatus;

namespace {

struct Sizes {
  int64_t batch, classes;
};
const Sizes kShapes[] = {{1, 1}, {1, 2}, {3, 10}, {33, 31}, {128, 100}, {7, 1000}, {1000, 397}, {65, 33}};

struct Result {
  at::Tensor d_logits;
  StepStatus status;
};

struct Lesson {
  at::Tensor teacher;
  double weight = 0, temperature = 1;
};

Result run(const at::Tensor& logits, const at::Tensor& labels, const Lesson& lesson = {}) {
  const OnDevice device_logits(logits), device_labels(labels.to(at::kInt));
  const OnDevice d_logits(logits.sizes(), at::kFloat);
  const StepStatus before;
  at::Tensor bytes = at::empty({int64_t(sizeof before)}, at::kByte);
  std::memcpy(bytes.data_ptr(), &before, sizeof before);
  const OnDevice status(bytes);
  kernels::cuda::CrossEntropyCall call;
  call.logits = device_logits.get<float>();
  call.labels = device_labels.get<int32_t>();
  call.d_logits = d_logits.get<float>();
  call.status = status.get<StepStatus>();
  call.batch = int(logits.size(0));
  call.classes = int(logits.size(1));
  std::optional<OnDevice> teacher;
  if (lesson.teacher.defined()) {
    call.teacher = teacher.emplace(lesson.teacher).get<float>();
    call.teacher_weight = float(lesson.weight);
    call.temperature = float(lesson.temperature);
  }
  kernels::cuda::cross_entropy(call, nullptr);
  Result result{d_logits.cpu(), {}};
  bytes = status.cpu();
  std::memcpy(&result.status, bytes.const_data_ptr(), sizeof result.status);
  return result;
}

at::Tensor labels_of(const Sizes& s) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t(s.batch));
  return at::randint(0, s.classes, {s.batch}, generator, at::kLong);
}

}  // namespace

TEST_CASE("cuda cross-entropy equals autograd", "[cuda][cross_entropy][gpu]") {
  PYRA_NEEDS_GPU();
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  const double scale = GENERATE(0.1, 3.0, 60.0);
  CAPTURE(shape.batch, shape.classes, scale);
  const at::Tensor logits = seeded({shape.batch, shape.classes}, 1, scale), labels = labels_of(shape);
  at::Tensor wide = logits.to(at::kDouble).set_requires_grad(true);
  const at::Tensor loss = at::cross_entropy_loss(wide, labels);
  const auto expected = gradients_of(loss, at::ones({}, at::kDouble), {wide});
  const Result got = run(logits, labels);
  CHECK(std::abs(got.status.pending_loss - loss.item<double>()) < 1e-6 * std::max(1.0, loss.item<double>()));
  CHECK(got.status.pending_correct == (logits.argmax(1) == labels).sum().item<int64_t>());
  if (shape.classes > 1) {
    CHECK(relative_difference(got.d_logits, expected[0]) < 1e-5);
  } else {
    CHECK(got.d_logits.abs().max().item<float>() < 1e-6f);
  }
  const Result again = run(logits, labels);
  CHECK(at::equal(again.d_logits, got.d_logits));
  CHECK(again.status.pending_loss == got.status.pending_loss);
  // Sums are the optimiser's to go on with.
  CHECK(got.status.images == 0);
  CHECK(got.status.loss_sum == 0);
  CHECK(got.status.stopped_at == -1);
}

TEST_CASE("a cuda loss with a teacher is Hinton's, and its gradient autograd's", "[cuda][cross_entropy][gpu]") {
  PYRA_NEEDS_GPU();
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  const double weight = GENERATE(0.3, 1.0), t = GENERATE(0.5, 1.0, 4.0);
  CAPTURE(shape.batch, shape.classes, weight, t);
  const at::Tensor logits = seeded({shape.batch, shape.classes}, 1, 3.0), labels = labels_of(shape);
  const at::Tensor teacher = seeded({shape.batch, shape.classes}, 2, 4.0);
  at::Tensor wide = logits.to(at::kDouble).set_requires_grad(true);
  const at::Tensor q = (teacher.to(at::kDouble) / t).log_softmax(1), p = (wide / t).log_softmax(1);
  const at::Tensor divergence = (q.exp() * (q - p)).sum() * (t * t / double(shape.batch));
  const at::Tensor loss = (1 - weight) * at::cross_entropy_loss(wide, labels) + weight * divergence;
  const auto expected = gradients_of(loss, at::ones({}, at::kDouble), {wide});
  const Result got = run(logits, labels, {teacher, weight, t});
  CHECK(got.status.pending_loss == Approx(loss.item<double>()).epsilon(1e-5).margin(1e-6));
  CHECK((got.d_logits.to(at::kDouble) - expected[0]).abs().max().item<double>() <
        1e-5 * std::max(1e-2, expected[0].abs().max().item<double>()));
  CHECK(got.status.pending_correct == (logits.argmax(1) == labels).sum().item<int64_t>());
}

TEST_CASE("of equal logits cuda cross-entropy takes the first", "[cuda][cross_entropy][gpu]") {
  PYRA_NEEDS_GPU();
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t(5));
  const at::Tensor logits = at::randint(0, 3, {500, 70}, generator, at::kFloat), best = logits.argmax(1);
  CHECK(run(logits, best).status.pending_correct == 500);
  CHECK(run(logits, (best + 1) % 70).status.pending_correct == 0);
}

TEST_CASE("an image's cuda logit gradients do not depend on its companions", "[cuda][cross_entropy][gpu]") {
  PYRA_NEEDS_GPU();
  const Sizes shape{64, 100};
  const at::Tensor logits = seeded({shape.batch, shape.classes}, 1, 2.0), labels = labels_of(shape);
  const at::Tensor all = run(logits, labels).d_logits;
  CHECK(at::equal(run(logits.flip(0), labels.flip(0)).d_logits.flip(0), all));
}

TEST_CASE("a cuda loss of logits that are not finite is not finite", "[cuda][cross_entropy][gpu]") {
  PYRA_NEEDS_GPU();
  const float bad = GENERATE(std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity());
  CAPTURE(bad);
  at::Tensor logits = seeded({5, 40}, 1);
  logits[3][35] = bad;
  CHECK_FALSE(std::isfinite(run(logits, at::zeros({5}, at::kLong)).status.pending_loss));
}

TEST_CASE("cuda head gradients equal the reference", "[cuda][cross_entropy][gpu]") {
  PYRA_NEEDS_GPU();
  const auto& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
  const int64_t channels = GENERATE(8, 192, 200, 768, 1024);
  CAPTURE(shape.batch, shape.classes, channels);
  const at::Tensor d_logits = seeded({shape.batch, shape.classes}, 1, 0.1);
  const at::Tensor features = seeded({shape.batch, channels}, 2);
  const OnDevice device_d(d_logits), device_features(features);
  const auto gradients = [&] {
    const OnDevice d_weight({shape.classes, channels}, at::kFloat), d_bias({shape.classes}, at::kFloat);
    kernels::cuda::HeadGradientCall call;
    call.d_logits = device_d.get<float>();
    call.features = device_features.get<float>();
    call.d_weight = d_weight.get<float>();
    call.d_bias = d_bias.get<float>();
    call.batch = int(shape.batch);
    call.classes = int(shape.classes);
    call.channels = int(channels);
    kernels::cuda::head_gradient(call, nullptr);
    return std::pair{d_weight.cpu(), d_bias.cpu()};
  };
  const auto got = gradients();
  const at::Tensor wide = d_logits.to(at::kDouble);
  CHECK(relative_difference(got.first, at::matmul(wide.t(), features.to(at::kDouble))) < 1e-5);
  CHECK(relative_difference(got.second, wide.sum(0)) < 1e-5);
  const auto again = gradients();
  CHECK(at::equal(again.first, got.first));
  CHECK(at::equal(again.second, got.second));
}

TEST_CASE("cuda cross-entropy refuses calls it cannot serve", "[cuda][cross_entropy][gpu]") {
  PYRA_NEEDS_GPU();
  CHECK_THROWS_WITH(kernels::cuda::cross_entropy({}, nullptr), Catch::Contains("cross_entropy"));
  CHECK_THROWS_WITH(kernels::cuda::head_gradient({}, nullptr), Catch::Contains("head_gradient"));
}
