#include "engine/cuda/host_planner.h"

#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "base/guard.h"
#include "kernels/cuda/match.h"
#include "kernels/cuda/rank.h"
#include "nn/vit_parts.h"

namespace pyra::engine {
namespace {

using kernels::cuda::DType;

at::Tensor view(const PinnedMemory& memory, at::IntArrayRef shape, at::ScalarType type) {
  return at::from_blob(memory.get(), shape, at::TensorOptions().dtype(type));
}

void put_indices(const at::Tensor& from, const PinnedMemory& to) {
  at::from_blob(to.get(), from.sizes(), at::TensorOptions().dtype(at::kInt)).copy_(from);
}

void put_floats(const at::Tensor& from, float* to) {
  at::from_blob(to, {from.numel()}, at::TensorOptions().dtype(at::kFloat)).copy_(from.detach().flatten());
}

}  // namespace

void Mirror::reserve(size_t bytes) {
  if (bytes <= host.bytes()) return;
  device = DeviceMemory(bytes);
  host = PinnedMemory(bytes);
}

void Mirror::to_host(size_t bytes, cudaStream_t stream) {
  PYRA_CUDA(cudaMemcpyAsync(host.get(), device.get(), bytes, cudaMemcpyDeviceToHost, stream));
}

void Mirror::to_device(size_t bytes, cudaStream_t stream) {
  PYRA_CUDA(cudaMemcpyAsync(device.get(), host.get(), bytes, cudaMemcpyHostToDevice, stream));
}

HostPlanner::HostPlanner(const nn::Vit& model, int block, int tokens, int kept)
    : config_(model.config()),
      who_(cat("merger '", model.merge()->name, "', block ", block)),
      merger_(model.merge()->merger),
      schedule_(model.merge()->schedule),
      learned_(model.merge()->learned),
      needs_(merger_->needs()),
      block_(block),
      tokens_(tokens),
      kept_(kept) {}

void HostPlanner::reserve(int batch) {
  const size_t b = size_t(batch), n = size_t(tokens_), c = size_t(config_.embed_dim), d = c / size_t(config_.num_heads);
  stream_.reserve(b * n * c * 4);
  sizes_.reserve(b * n * 4);
  keys_.reserve(b * n * d * 4);
  attention_.reserve(b * n * 4);
  for (Mirror* indices : {&keep_, &src_, &dst_, &weight_, &scale_}) indices->reserve(b * n * 4);
  gate_.reserve((n + 3 * c) * 4);
}

void HostPlanner::send_inputs(const Inputs& inputs, int batch, cudaStream_t stream) {
  const int heads = int(config_.num_heads), channels = int(config_.embed_dim);
  const size_t rows = size_t(batch) * size_t(tokens_);
  const auto copy = [&](const PinnedMemory& to, const void* from, size_t bytes) {
    PYRA_CUDA(cudaMemcpyAsync(to.get(), from, bytes, cudaMemcpyDeviceToHost, stream));
  };
  copy(stream_.host, inputs.stream, rows * size_t(channels) * kernels::cuda::size_of(inputs.residual));
  if (inputs.sizes) copy(sizes_.host, inputs.sizes, rows * 4);
  if (needs_.key_mean) {
    kernels::cuda::key_mean(inputs.qkv, inputs.compute, batch, tokens_, heads, channels / heads,
                            keys_.device.get<float>(), stream);
    keys_.to_host(rows * size_t(channels / heads) * 4, stream);
  }
  if (needs_.class_attention) {
    kernels::cuda::class_attention_mean(inputs.class_rows, batch, heads, tokens_, attention_.device.get<float>(),
                                        stream);
    attention_.to_host(rows * 4, stream);
  }
}

HostPlanner::Shape HostPlanner::make_plan(const Task& task) {
  const c10::InferenceMode no_gradients;
  const int64_t b = task.batch, n = tokens_, c = config_.embed_dim;
  sdk::MergeInputs inputs{.block = block_,
                          .protected_tokens = config_.protected_tokens(),
                          .tokens = view(stream_.host, {b, n, c}, task.stream_type).to(at::kFloat),
                          .sizes = task.has_sizes ? view(sizes_.host, {b, n}, at::kFloat) : at::ones({b, n}),
                          .key_mean = {},
                          .class_attention = {},
                          .learned = learned_};
  if (needs_.key_mean) inputs.key_mean = view(keys_.host, {b, n, c / config_.num_heads}, at::kFloat);
  if (needs_.class_attention) inputs.class_attention = view(attention_.host, {b, n}, at::kFloat);
  const auto plan = nn::arguments_of(guard(who_, "plan()", [&] { return merger_->plan(inputs, schedule_); }));
  std::string wrong = kernels::check_merge(plan, b, n, kept_, config_.protected_tokens());
  if (wrong.empty() && plan.gate && plan.gate->b.size(1) != c)
    wrong = cat("gate.b has ", plan.gate->b.size(1), " channels; expected ", c);
  if (!wrong.empty()) fail(ExitCode::plugin, who_, ": ", wrong);

  put_indices(plan.keep, keep_.host);
  put_indices(plan.src, src_.host);
  put_indices(plan.dst, dst_.host);
  Shape shape{.merged = int(plan.src.size(1)), .weighted = plan.weighted};
  shape.src_weight = plan.src_weight.defined();
  shape.src_size_scale = plan.src_size_scale.defined();
  if (shape.src_weight) put_floats(plan.src_weight, weight_.host.get<float>());
  if (shape.src_size_scale) put_floats(plan.src_size_scale, scale_.host.get<float>());
  if (plan.gate) {
    const kernels::MergeGate& gate = *plan.gate;
    float* to = gate_.host.get<float>();
    put_floats(gate.b, to);
    put_floats(gate.weight, to + c);
    put_floats(gate.bias, to + 2 * c);
    put_floats(gate.a, to + 3 * c);
    shape.gate = true;
    shape.gate_eps = float(gate.eps);
  }
  return shape;
}

/// Indices that are in range, for the rest of a pass whose result nobody will see.
void HostPlanner::take_harmless_plan(int batch) noexcept {
  for (int image = 0; image < batch; ++image)
    std::iota(keep_.host.get<int32_t>() + image * kept_, keep_.host.get<int32_t>() + (image + 1) * kept_, 0);
  const size_t count = shape_ ? size_t(batch) * size_t(shape_->merged) : 0;
  std::fill_n(src_.host.get<int32_t>(), count, 0);
  std::fill_n(dst_.host.get<int32_t>(), count, 0);
}

void HostPlanner::keep_failure(std::exception_ptr failure) noexcept {
  const std::lock_guard lock(mutex_);
  if (!failure_) failure_ = std::move(failure);
}

std::exception_ptr HostPlanner::take_failure() {
  const std::lock_guard lock(mutex_);
  return std::exchange(failure_, nullptr);
}

void HostPlanner::run(void* argument) {
  const Task& task = *static_cast<const Task*>(argument);
  HostPlanner& self = *task.planner;
  // A driver's thread: nothing may leave it but through failure_.
  try {
    if (self.make_plan(task) != *self.shape_)
      fail(ExitCode::plugin, self.who_,
           ": the plan's shape is another than in the pass before; it may depend on the schedule alone");
  } catch (...) {
    self.keep_failure(std::current_exception());
    self.take_harmless_plan(task.batch);
  }
}

void HostPlanner::send_plan(int batch, kernels::cuda::MergeCall& call, cudaStream_t stream) {
  const size_t b = size_t(batch), r = size_t(shape_->merged), c = size_t(config_.embed_dim);
  keep_.to_device(b * size_t(kept_) * 4, stream);
  call.keep = keep_.device.get<int32_t>();
  call.merged = shape_->merged;
  call.weighted = shape_->weighted;
  if (r == 0) return;
  src_.to_device(b * r * 4, stream);
  dst_.to_device(b * r * 4, stream);
  call.src = src_.device.get<int32_t>();
  call.dst = dst_.device.get<int32_t>();
  if (shape_->src_weight) {
    weight_.to_device(b * r * 4, stream);
    call.src_weight = weight_.device.get<float>();
  }
  if (shape_->src_size_scale) {
    scale_.to_device(b * r * 4, stream);
    call.src_size_scale = scale_.device.get<float>();
  }
  if (shape_->gate) {
    // The merge may read a gate before await_earlier() (dependent.cuh): nothing but this copy may stand between.
    gate_.to_device((r + 3 * c) * 4, stream);
    const float* gate = gate_.device.get<float>();
    call.gate_b = gate;
    call.gate_weight = gate + c;
    call.gate_bias = gate + 2 * c;
    call.gate_a = gate + 3 * c;
    call.gate_eps = shape_->gate_eps;
  }
}

void HostPlanner::enqueue(const Inputs& inputs, int batch, kernels::cuda::MergeCall& call, cudaStream_t stream) {
  const auto type = inputs.residual == DType::fp32   ? at::kFloat
                    : inputs.residual == DType::bf16 ? at::kBFloat16
                                                     : at::kHalf;
  auto task = std::make_unique<Task>(Task{this, batch, inputs.sizes != nullptr, type});
  send_inputs(inputs, batch, stream);
  if (!shape_) {
    PYRA_CUDA(cudaStreamSynchronize(stream));
    shape_ = make_plan(*task);
  } else {
    PYRA_CUDA(cudaLaunchHostFunc(stream, &HostPlanner::run, task.get()));
    tasks_.push_back(std::move(task));
  }
  send_plan(batch, call, stream);
}

}  // namespace pyra::engine
