#include "train/adamw.h"

#include <cmath>

#include "base/error.h"

namespace pyra::train {
namespace {

/// A step's constants, rounded to fp32 once.
struct StepScalars {
  float keep;   // 1 - lr wd
  float rate1;  // 1 - beta1
  float beta2, rate2;
  float step;     // lr / (1 - beta1^t)
  float unbias2;  // 1 / sqrt(1 - beta2^t)
  float eps;
};

StepScalars make_scalars(const AdamWSettings& s, double lr, int64_t t) {
  return {.keep = float(1 - lr * s.weight_decay),
          .rate1 = float(1 - s.beta1),
          .beta2 = float(s.beta2),
          .rate2 = float(1 - s.beta2),
          .step = float(lr / (1 - std::pow(s.beta1, double(t)))),
          .unbias2 = float(1 / std::sqrt(1 - std::pow(s.beta2, double(t)))),
          .eps = float(s.eps)};
}

void update(float* __restrict value, float* __restrict first, float* __restrict second,
            const float* __restrict gradient, int64_t n, const StepScalars& s) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = gradient[i];
    const float m = first[i] + s.rate1 * (g - first[i]);
    const float v = s.beta2 * second[i] + s.rate2 * g * g;
    first[i] = m;
    second[i] = v;
    value[i] = s.keep * value[i] - s.step * m / (std::sqrt(v) * s.unbias2 + s.eps);
  }
}

}  // namespace

void AdamW::step(double lr, double merge_lr) {
  constexpr int64_t kGrain = 1 << 15;  // below this a second thread costs more than it saves
  ++steps_;
  const StepScalars common = make_scalars(settings_, lr, steps_), merge = make_scalars(settings_, merge_lr, steps_);
  for (TrainedTensor& t : tensors_) {
    if (!t.value.grad().defined()) continue;
    const at::Tensor gradient = t.value.grad().contiguous();
    const StepScalars& scalars = t.merge_group ? merge : common;
    float* value = t.value.data_ptr<float>();
    float* first = t.first.data_ptr<float>();
    float* second = t.second.data_ptr<float>();
    const float* g = gradient.const_data_ptr<float>();
    at::parallel_for(0, t.value.numel(), kGrain, [&](int64_t begin, int64_t end) {
      update(value + begin, first + begin, second + begin, g + begin, end - begin, scalars);
    });
  }
  drop_gradients();
}

double AdamW::gradient_norm() const {
  double sum = 0;
  for (const TrainedTensor& t : tensors_) {
    if (!t.value.grad().defined()) continue;
    const double norm = at::linalg_vector_norm(t.value.grad(), 2).item<double>();
    sum += norm * norm;
  }
  return std::sqrt(sum);
}

void AdamW::drop_gradients() {
  for (TrainedTensor& t : tensors_) t.value.mutable_grad().reset();
}

sdk::TensorMap trained_state(const std::vector<TrainedTensor>& tensors) {
  sdk::TensorMap state;
  for (const TrainedTensor& t : tensors) {
    state["value." + t.name] = t.value.detach();
    state["first." + t.name] = t.first;
    state["second." + t.name] = t.second;
  }
  return state;
}

void restore_trained(const std::vector<TrainedTensor>& tensors, const sdk::TensorMap& state, const std::string& where) {
  sdk::TensorMap mine = trained_state(tensors);
  for (auto& [name, target] : mine) {
    const auto found = state.find(name);
    if (found == state.end()) fail(ExitCode::input, where, ": tensor '", name, "' is missing");
    if (found->second.sizes() != target.sizes() || found->second.scalar_type() != at::kFloat) {
      fail(ExitCode::input, where, ": tensor '", name, "' is ", found->second.scalar_type(), " ", found->second.sizes(),
           ", this run needs fp32 ", target.sizes());
    }
  }
  if (mine.size() != state.size()) {
    fail(ExitCode::input, where, ": holds ", state.size(), " tensors, this run has ", mine.size());
  }
  for (auto& [name, target] : mine) target.copy_(state.find(name)->second);
}

}  // namespace pyra::train
