// The forward pass of a search's step: embedding, blocks under their masks, head and loss.
#include <algorithm>

#include "engine/cuda/cuda_soft_pass.h"
#include "kernels/cuda/cross_entropy.h"
#include "kernels/cuda/embed.h"
#include "kernels/cuda/gelu_train.h"
#include "kernels/cuda/masked_attention.h"
#include "kernels/cuda/norm_train.h"
#include "kernels/cuda/rank.h"
#include "kernels/cuda/soft_reduce.h"

namespace pyra::engine {

namespace cuda = kernels::cuda;

const float* CudaSoftPass::sizes(int index) const {
  return proportional_ ? memory_.blocks[size_t(index)].sizes.get<float>() : nullptr;
}

const DeviceMemory& CudaSoftPass::sizes_after(int index) const {
  return index + 1 < depth() ? memory_.blocks[size_t(index) + 1].sizes : memory_.last_sizes;
}

const DeviceMemory& CudaSoftPass::mask_after(int index) const {
  return index + 1 < depth() ? memory_.blocks[size_t(index) + 1].mask : memory_.last_mask;
}

/// Of a layer of a block, to the compute type; whoever calls says where the result goes.
cuda::LinearCall CudaSoftPass::call_of(const DeviceLinear& layer, const void* x, int rows) const {
  return {.x = x,
          .weight = layer.weight,
          .bias = layer.bias,
          .rows = rows,
          .in = layer.in,
          .out = layer.out,
          .compute = compute(),
          .result = compute(),
          .math = model_.types.tf32 ? cuda::MatrixMath::tf32 : cuda::MatrixMath::exact};
}

void CudaSoftPass::embed(bool is_float) {
  const nn::VitConfig& config = model_.config;
  const int patches = int(config.patches());
  cuda::PatchCall call{.images = memory_.images.get(),
                       .is_float = is_float,
                       .batch = batch_,
                       .side = int(config.image_size),
                       .patch = int(config.patch_size),
                       .out = memory_.wide.get(),
                       .compute = compute()};
  std::copy_n(preprocess_.mean.begin(), 3, call.mean);
  std::copy_n(preprocess_.std.begin(), 3, call.std);
  cuda::extract_patches(call, stream_);
  cuda::LinearCall product = call_of(model_.patch_embed, memory_.wide.get(), batch_ * patches);
  product.y = memory_.branch.get();
  runner_.run(product, stream_);
  now_ = 0;
  // Its norm is made again by the first block, which keeps what the way back needs.
  cuda::assemble_tokens({.embedded = memory_.branch.get(),
                         .prefix = model_.prefix,
                         .positions = model_.positions,
                         .batch = batch_,
                         .patches = patches,
                         .protected_tokens = int(config.protected_tokens()),
                         .channels = channels(),
                         .x = memory_.stream[0].get(),
                         .norm_weight = model_.blocks[0].norm1.weight,
                         .norm_bias = model_.blocks[0].norm1.bias,
                         .norm_eps = float(config.norm_eps),
                         .y = memory_.rows.get(),
                         .residual = DType::fp32,
                         .compute = compute()},
                        stream_);
}

/// memory_.rows = the stream's norm.
void CudaSoftPass::add_norm(const DeviceNorm& norm, const DeviceMemory& normalised, const DeviceMemory& inverse) {
  cuda::add_norm({.x = memory_.stream[size_t(now_)].get<float>(),
                  .weight = norm.weight,
                  .bias = norm.bias,
                  .eps = float(model_.config.norm_eps),
                  .normalised = normalised.get(),
                  .inverse_deviation = inverse.get<float>(),
                  .y = memory_.rows.get(),
                  .y_stride = channels(),
                  .rows = rows(),
                  .channels = channels(),
                  .compute = compute()},
                 stream_);
}

/// The stream and a layer's output, summed in the stream's other half: the first call with a shape runs the product
/// several times, and a sum in place would grow.
void CudaSoftPass::onto_stream(const DeviceLinear& layer, const void* x) {
  cuda::LinearCall call = call_of(layer, x, rows());
  call.residual = memory_.stream[size_t(now_)].get();
  call.y = memory_.stream[size_t(1 - now_)].get();
  call.result = DType::fp32;
  runner_.run(call, stream_);
  now_ = 1 - now_;
}

void CudaSoftPass::attend(int index) {
  const SoftBlock& saved = memory_.blocks[size_t(index)];
  cuda::masked_attention({.qkv = saved.qkv.get(),
                          .sizes = sizes(index),
                          .mask = saved.mask.get<float>(),
                          .out = saved.attended.get(),
                          .class_rows = memory_.class_rows.get<float>(),
                          .top = saved.top.get<float>(),
                          .inverse = saved.inverse.get<float>(),
                          .peak = saved.peak.get<int32_t>(),
                          .value_mean = saved.value_mean.get<float>(),
                          .batch = batch_,
                          .tokens = tokens(),
                          .heads = heads(),
                          .head_dim = channels() / heads(),
                          .dtype = compute()},
                         stream_);
}

/// Every token is ranked, also those that are gone: all of them change places.
void CudaSoftPass::reduce(int index) {
  const SoftBlock& saved = memory_.blocks[size_t(index)];
  const kernels::SoftCounts& counts = counts_[size_t(index)];
  cuda::ranking_attention(memory_.class_rows.get<float>(), saved.mask.get<float>(), batch_, heads(), tokens(),
                          memory_.attention.get<float>(), stream_);
  cuda::rank_tokens({.tokens = memory_.stream[size_t(now_)].get(),
                     .class_rows = memory_.attention.get<float>(),
                     .batch = batch_,
                     .token_count = tokens(),
                     .heads = 1,
                     .channels = channels(),
                     .dtype = DType::fp32,
                     .prune = tokens(),
                     .merge = counts.kept,
                     .protected_tokens = int(model_.config.protected_tokens()),
                     .keep = saved.keep.get<int32_t>(),
                     .src = saved.src.get<int32_t>(),
                     .dst = saved.dst.get<int32_t>(),
                     .cosine = saved.cosine.get<float>()},
                    stream_);
  cuda::soft_reduce({.x = memory_.stream[size_t(now_)].get<float>(),
                     .sizes = saved.sizes.get<float>(),
                     .mask = saved.mask.get<float>(),
                     .keep = saved.keep.get<int32_t>(),
                     .src = saved.src.get<int32_t>(),
                     .dst = saved.dst.get<int32_t>(),
                     .cosine = saved.cosine.get<float>(),
                     .counts = counts,
                     .batch = batch_,
                     .tokens = tokens(),
                     .channels = channels(),
                     .x_out = memory_.stream[size_t(1 - now_)].get<float>(),
                     .sizes_out = sizes_after(index).get<float>(),
                     .mask_out = mask_after(index).get<float>()},
                    stream_);
  now_ = 1 - now_;
}

/// fc1 and GELU: what GELU is applied to is kept, the result stands in memory_.wide.
void CudaSoftPass::hidden_rows(int index) {
  const DeviceLinear& fc1 = model_.blocks[size_t(index)].fc1;
  void* const hidden = memory_.blocks[size_t(index)].hidden.get();
  cuda::LinearCall call = call_of(fc1, memory_.rows.get(), rows());
  if (exact_gelu()) {
    call.y = hidden;
    runner_.run(call, stream_);
    cuda::gelu_forward(hidden, memory_.wide.get(), compute(), int64_t(rows()) * fc1.out, /*tanh=*/false, stream_);
    return;
  }
  call.y = memory_.wide.get();
  call.activation = hidden;
  call.epilogue = cuda::Epilogue::gelu_tanh_keep;
  runner_.run(call, stream_);
}

void CudaSoftPass::forward_block(int index) {
  const DeviceBlock& block = model_.blocks[size_t(index)];
  const SoftBlock& saved = memory_.blocks[size_t(index)];
  add_norm(block.norm1, saved.normalised1, saved.inverse1);
  cuda::LinearCall qkv = call_of(block.qkv, memory_.rows.get(), rows());
  qkv.y = saved.qkv.get();
  runner_.run(qkv, stream_);
  attend(index);
  onto_stream(block.proj, saved.attended.get());
  reduce(index);
  add_norm(block.norm2, saved.normalised2, saved.inverse2);
  hidden_rows(index);
  onto_stream(block.fc2, memory_.wide.get());
}

void CudaSoftPass::head() {
  const nn::VitConfig& config = model_.config;
  const float* x = memory_.stream[size_t(now_)].get<float>();
  int64_t stride = int64_t(tokens()) * channels();
  if (config.pool == nn::Pool::avg) {
    cuda::masked_mean(x, memory_.last_mask.get<float>(), batch_, tokens(), int(config.protected_tokens()), channels(),
                      memory_.pooled.get<float>(), stream_);
    x = memory_.pooled.get<float>();
    stride = channels();
  }
  cuda::norm_rows({.x = x,
                   .x_stride = stride,
                   .weight = model_.norm.weight,
                   .bias = model_.norm.bias,
                   .eps = float(config.norm_eps),
                   .normalised = memory_.normalised.get<float>(),
                   .inverse_deviation = memory_.inverse.get<float>(),
                   .y = memory_.features.get<float>(),
                   .rows = batch_,
                   .channels = channels()},
                  stream_);
  const DeviceLinear& layer = model_.heads[0];
  runner_.run({.x = memory_.features.get(),
               .weight = layer.weight,
               .bias = layer.bias,
               .y = memory_.logits.get(),
               .rows = batch_,
               .in = layer.in,
               .out = layer.out,
               .compute = DType::fp32,
               .result = DType::fp32},
              stream_);
  cuda::cross_entropy({.logits = memory_.logits.get<float>(),
                       .labels = memory_.labels.get<int32_t>(),
                       .d_logits = memory_.d_logits.get<float>(),
                       .status = memory_.status.get<cuda::StepStatus>(),
                       .batch = batch_,
                       .classes = layer.out},
                      stream_);
}

}  // namespace pyra::engine
