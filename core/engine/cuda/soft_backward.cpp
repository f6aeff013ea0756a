// The way back of a search's step: from the loss to the masks, through a model without gradients of its own. It ends at
// the first block whose rates say anything: what lies before does not see them.
#include <algorithm>

#include "engine/cuda/cuda_soft_pass.h"
#include "kernels/cuda/gelu_train.h"
#include "kernels/cuda/masked_attention.h"
#include "kernels/cuda/norm_train.h"
#include "kernels/cuda/soft_reduce.h"

namespace pyra::engine {

namespace cuda = kernels::cuda;

/// dx = dy W; `activation`: times GELU's slope there.
void CudaSoftPass::product_backward(const DeviceLinear& layer, const void* dy, void* dx, const void* activation) {
  cuda::LinearCall call = call_of(layer, dy, rows());
  call.bias = nullptr;
  call.y = dx;
  call.in = layer.out;
  call.out = layer.in;
  call.transposed = true;
  if (activation) {
    call.activation = const_cast<void*>(activation);
    call.epilogue = cuda::Epilogue::gelu_tanh_back;
  }
  runner_.run(call, stream_);
}

/// From the gradient of the norm's output, in memory_.rows, onto the stream's; `d_branch`: that, rounded, or null.
void CudaSoftPass::norm_backward(const DeviceNorm& norm, const DeviceMemory& normalised, const DeviceMemory& inverse,
                                 void* d_branch) {
  cuda::norm_backward({.d_y = memory_.rows.get(),
                       .d_y_stride = channels(),
                       .normalised = normalised.get(),
                       .inverse_deviation = inverse.get<float>(),
                       .weight = norm.weight,
                       .d_x = memory_.d_stream[size_t(d_now_)].get<float>(),
                       .d_branch = d_branch,
                       .rows = rows(),
                       .channels = channels(),
                       .compute = compute()},
                      stream_);
}

/// To the stream's gradient, to memory_.branch, which is that of what fc2 added, and to the last mask's.
void CudaSoftPass::head_backward() {
  const nn::VitConfig& config = model_.config;
  const bool pools = config.pool == nn::Pool::avg;
  d_now_ = d_mask_now_ = 0;
  float *const d_stream = memory_.d_stream[0].get<float>(), *const d_mask = memory_.d_mask[0].get<float>();
  runner_.run({.x = memory_.d_logits.get(),
               .weight = model_.heads[0].weight,
               .y = memory_.d_features.get(),
               .rows = batch_,
               .in = model_.heads[0].out,
               .out = channels(),
               .transposed = true,
               .compute = DType::fp32,
               .result = DType::fp32},
              stream_);
  cuda::norm_rows_backward({.d_y = memory_.d_features.get<float>(),
                            .normalised = memory_.normalised.get<float>(),
                            .inverse_deviation = memory_.inverse.get<float>(),
                            .weight = model_.norm.weight,
                            .batch = batch_,
                            .tokens = pools ? 1 : tokens(),
                            .channels = channels(),
                            .d_x = pools ? memory_.d_pooled.get<float>() : d_stream},
                           stream_);
  if (pools)
    cuda::masked_mean_backward({.x = memory_.stream[size_t(now_)].get<float>(),
                                .mask = memory_.last_mask.get<float>(),
                                .mean = memory_.pooled.get<float>(),
                                .d_mean = memory_.d_pooled.get<float>(),
                                .batch = batch_,
                                .tokens = tokens(),
                                .first = int(config.protected_tokens()),
                                .channels = channels(),
                                .d_x = d_stream,
                                .d_mask = d_mask},
                               stream_);
  else
    PYRA_CUDA(cudaMemsetAsync(d_mask, 0, memory_.d_mask[0].bytes(), stream_));
  cuda::scale_rows(
      {.d_x = d_stream, .rows = rows(), .channels = channels(), .out = memory_.branch.get(), .compute = compute()},
      stream_);
}

/// From memory_.branch through the MLP and norm2 onto the stream's gradient.
void CudaSoftPass::backward_mlp(int index) {
  const DeviceBlock& block = model_.blocks[size_t(index)];
  const SoftBlock& saved = memory_.blocks[size_t(index)];
  void* const d_hidden = memory_.wide.get();
  product_backward(block.fc2, memory_.branch.get(), d_hidden, exact_gelu() ? nullptr : saved.hidden.get());
  if (exact_gelu())
    cuda::gelu_backward(saved.hidden.get(), d_hidden, compute(), int64_t(rows()) * block.fc1.out, /*tanh=*/false,
                        stream_);
  product_backward(block.fc1, d_hidden, memory_.rows.get());
  norm_backward(block.norm2, saved.normalised2, saved.inverse2, nullptr);
}

/// What becomes of the gradient of the masks behind the block: that of its survival probabilities, and of those before.
void CudaSoftPass::backward_mask(int index) {
  const SoftBlock& saved = memory_.blocks[size_t(index)];
  float* const d_survival = memory_.d_survival.get<float>() + int64_t(2) * index * tokens();
  cuda::soft_mask_backward({.mask = saved.mask.get<float>(),
                            .keep = saved.keep.get<int32_t>(),
                            .src = saved.src.get<int32_t>(),
                            .counts = counts_[size_t(index)],
                            .batch = batch_,
                            .tokens = tokens(),
                            .heads = heads(),
                            .d_mask_rows = index + 1 < depth() ? memory_.d_mask_rows.get<float>() : nullptr,
                            .d_mask_out = memory_.d_mask[size_t(d_mask_now_)].get<float>(),
                            .d_ranks = memory_.d_ranks.get<float>(),
                            .d_mask = memory_.d_mask[size_t(1 - d_mask_now_)].get<float>(),
                            .d_prune = d_survival,
                            .d_merge = d_survival + tokens()},
                           stream_);
  d_mask_now_ = 1 - d_mask_now_;
}

/// Back to the tokens' places before the reduction, and to memory_.branch, the gradient of what attention added.
void CudaSoftPass::backward_reduce(int index) {
  const SoftBlock& saved = memory_.blocks[size_t(index)];
  cuda::soft_reduce_backward({.keep = saved.keep.get<int32_t>(),
                              .src = saved.src.get<int32_t>(),
                              .dst = saved.dst.get<int32_t>(),
                              .counts = counts_[size_t(index)],
                              .batch = batch_,
                              .tokens = tokens(),
                              .channels = channels(),
                              .d_out = memory_.d_stream[size_t(d_now_)].get<float>(),
                              .d_x = memory_.d_stream[size_t(1 - d_now_)].get<float>(),
                              .d_branch = memory_.branch.get(),
                              .compute = compute()},
                             stream_);
  d_now_ = 1 - d_now_;
}

/// From memory_.branch to the gradients of q, k and v, in memory_.wide, and of the mask.
void CudaSoftPass::backward_attention(int index) {
  const SoftBlock& saved = memory_.blocks[size_t(index)];
  product_backward(model_.blocks[size_t(index)].proj, memory_.branch.get(), memory_.rows.get());
  cuda::masked_attention_backward({.qkv = saved.qkv.get(),
                                   .sizes = sizes(index),
                                   .mask = saved.mask.get<float>(),
                                   .out = saved.attended.get(),
                                   .top = saved.top.get<float>(),
                                   .inverse = saved.inverse.get<float>(),
                                   .peak = saved.peak.get<int32_t>(),
                                   .value_mean = saved.value_mean.get<float>(),
                                   .d_out = memory_.rows.get(),
                                   .delta = memory_.delta.get<float>(),
                                   .correction = memory_.correction.get<float>(),
                                   .d_qkv = memory_.wide.get(),
                                   .d_mask_rows = memory_.d_mask_rows.get<float>(),
                                   .batch = batch_,
                                   .tokens = tokens(),
                                   .heads = heads(),
                                   .head_dim = channels() / heads(),
                                   .dtype = compute()},
                                  stream_);
}

/// Onto the stream's gradient, and to memory_.branch, the gradient of what the MLP before added.
void CudaSoftPass::backward_qkv(int index) {
  const DeviceBlock& block = model_.blocks[size_t(index)];
  const SoftBlock& saved = memory_.blocks[size_t(index)];
  product_backward(block.qkv, memory_.wide.get(), memory_.rows.get());
  norm_backward(block.norm1, saved.normalised1, saved.inverse1, memory_.branch.get());
}

void CudaSoftPass::backward() {
  PYRA_CUDA(cudaMemsetAsync(memory_.d_survival.get(), 0, memory_.d_survival.bytes(), stream_));
  const auto acts = std::find_if(counts_.begin(), counts_.end(), [](const auto& counts) { return counts.acts(); });
  if (acts == counts_.end()) return;
  const int first = int(acts - counts_.begin());
  head_backward();
  for (int i = depth() - 1; i > first; --i) {
    backward_mlp(i);
    backward_mask(i);
    backward_reduce(i);
    backward_attention(i);
    if (i > first + 1) backward_qkv(i);
  }
  backward_mask(first);
}

}  // namespace pyra::engine
