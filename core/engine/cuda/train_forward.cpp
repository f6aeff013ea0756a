#include <algorithm>

#include "base/error.h"
#include "engine/cuda/train_step.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/cross_entropy.h"
#include "kernels/cuda/embed.h"
#include "kernels/cuda/gelu_train.h"
#include "kernels/cuda/layer_norm.h"
#include "kernels/cuda/match.h"
#include "kernels/cuda/merge.h"
#include "kernels/cuda/norm_train.h"
#include "kernels/cuda/rank.h"

namespace pyra::engine {

namespace cuda = kernels::cuda;
using sdk::LinearKind;

TrainStepRunner::TrainStepRunner(TrainModel& model, const nn::Preprocess& preprocess, int batch,
                                 std::shared_ptr<cuda::GemmCache> cache)
    : model_(model),
      preprocess_(preprocess),
      memory_(model, batch),
      runner_(std::move(cache)),
      exact_gelu_(model.types.compute == DType::fp32) {
  // A graph's kernels keep the priority of the stream that they were captured from.
  int least = 0, greatest = 0;
  PYRA_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  for (cudaStream_t* stream : {&main_, &side_})
    PYRA_CUDA(cudaStreamCreateWithPriority(stream, cudaStreamNonBlocking, greatest));
  PYRA_CUDA(cudaStreamCreateWithPriority(&aside_, cudaStreamNonBlocking, least));
  PYRA_CUDA(cudaEventCreateWithFlags(&fork_, cudaEventDisableTiming));
  PYRA_CUDA(cudaEventCreateWithFlags(&join_, cudaEventDisableTiming));
  plan_partials();
}

TrainStepRunner::~TrainStepRunner() {
  for (cudaEvent_t event : {fork_, join_})
    if (event) (void)cudaEventDestroy(event);
  for (cudaStream_t stream : {main_, side_, aside_})
    if (stream) (void)cudaStreamDestroy(stream);
}

const float* TrainStepRunner::scale_of(const TrainBatch& batch, int block, int branch) const {
  if (!batch.branch_scale || block == 0) return nullptr;  // the first block is never dropped
  return batch.branch_scale + (2 * block + branch) * memory_.batch;
}

/// Of the layer with what stands in the columns behind; whoever calls says where the result goes.
cuda::LinearCall TrainStepRunner::call_of(const TrainLinear& layer, const void* x, int rows) const {
  return {.x = x,
          .weight = layer.weight,
          .bias = layer.bias,
          .rows = rows,
          .in = layer.stride,
          .out = layer.out,
          .compute = model_.types.compute,
          .result = model_.types.compute,
          .math = model_.types.tf32 ? cuda::MatrixMath::tf32 : cuda::MatrixMath::exact};
}

void TrainStepRunner::product(const TrainLinear& layer, const void* x, int rows, void* y) {
  cuda::LinearCall call = call_of(layer, x, rows);
  call.y = y;
  runner_.run(call, main_);
}

/// The columns behind a layer's input: drop(x) Aᵀ, kept for B's gradient too.
void TrainStepRunner::low_rank_input(const TrainLinear& layer, int block, LinearKind kind, void* input, int rows) {
  if (!layer.lora) return;
  const LoraTerm& term = *layer.lora;
  const size_t size = cuda::size_of(model_.types.compute);
  cuda::lora_down({.x = input,
                   .x_stride = layer.stride,
                   .a = term.a,
                   .h = static_cast<char*>(input) + size_t(layer.in) * size,
                   .h_stride = layer.stride,
                   .h_copy = memory_.blocks[size_t(block)].low[size_t(kind)].get(),
                   .padded = term.padded,
                   .rows = rows,
                   .in = layer.in,
                   .rank = term.rank,
                   .dropout = term.dropout,
                   .compute = model_.types.compute},
                  main_);
}

void TrainStepRunner::embed(const TrainBatch& batch) {
  const nn::VitConfig& config = model_.config;
  const int patches = int(config.patches()), channels = int(config.embed_dim);
  cuda::PatchCall call{.images = batch.images,
                       .is_float = batch.is_float,
                       .batch = memory_.batch,
                       .side = int(config.image_size),
                       .patch = int(config.patch_size),
                       .out = memory_.patches.get(),
                       .compute = model_.types.compute};
  std::copy_n(preprocess_.mean.begin(), 3, call.mean);
  std::copy_n(preprocess_.std.begin(), 3, call.std);
  cuda::extract_patches(call, main_);
  product(model_.patch_embed, memory_.patches.get(), memory_.batch * patches, memory_.embedded.get());
  cuda::assemble_tokens({.embedded = memory_.embedded.get(),
                         .prefix = model_.prefix,
                         .positions = model_.positions,
                         .batch = memory_.batch,
                         .patches = patches,
                         .protected_tokens = int(config.protected_tokens()),
                         .channels = channels,
                         .x = memory_.stream[0].get(),
                         .norm_weight = model_.blocks[0].norm1.weight,
                         .norm_bias = model_.blocks[0].norm1.bias,
                         .norm_eps = float(config.norm_eps),
                         .y = memory_.blocks[0].input1.get(),
                         .residual = DType::fp32,
                         .compute = model_.types.compute},
                        main_);
}

/// x += drop-path * branch, where there is one, and then the norm, where there is one.
void TrainStepRunner::add_and_norm(const float* branch_scale, const DeviceSpan* branch, int tokens,
                                   const NormPlaces& then) {
  cuda::AddNormCall call{.x = memory_.stream[size_t(stream_)].get<float>(),
                         .branch = branch ? branch->get() : nullptr,
                         .branch_scale = branch_scale,
                         .rows_per_image = tokens,
                         .rows = memory_.batch * tokens,
                         .channels = int(model_.config.embed_dim),
                         .compute = model_.types.compute};
  if (then.norm) {
    call.weight = then.norm->weight;
    call.bias = then.norm->bias;
    call.eps = float(model_.config.norm_eps);
    call.normalised = then.normalised->get();
    call.inverse_deviation = then.inverse->get<float>();
    call.y = then.y->get();
    call.y_stride = then.y_stride;
  }
  cuda::add_norm(call, main_);
}

void TrainStepRunner::match(int index) {
  const TrainBlock& block = model_.blocks[size_t(index)];
  const BlockMemory& m = memory_.blocks[size_t(index)];
  const nn::VitConfig& config = model_.config;
  PYRA_CUDA(cudaEventRecord(fork_, main_));
  PYRA_CUDA(cudaStreamWaitEvent(side_, fork_, 0));
  cuda::match_bipartite({.qkv = m.qkv.get(),
                         .batch = memory_.batch,
                         .tokens = block.tokens,
                         .heads = int(config.num_heads),
                         .head_dim = int(config.embed_dim / config.num_heads),
                         .dtype = model_.types.compute,
                         .r = block.merge->merged,
                         .protected_tokens = int(config.protected_tokens()),
                         .in_side_a = block.merge->in_side_a,
                         .keep = m.keep.get<int32_t>(),
                         .src = m.src.get<int32_t>(),
                         .dst = m.dst.get<int32_t>()},
                        side_);
  PYRA_CUDA(cudaEventRecord(join_, side_));
}

const float* TrainStepRunner::sizes() const {
  return stream_ > 0 ? memory_.sizes[size_t(stream_ - 1)].get<float>() : nullptr;
}

void TrainStepRunner::attend(int index) {
  const TrainBlock& block = model_.blocks[size_t(index)];
  const BlockMemory& m = memory_.blocks[size_t(index)];
  const nn::VitConfig& config = model_.config;
  const bool ranks = block.merge && block.merge->kind == DeviceMerge::Kind::rank;
  cuda::attention({.qkv = m.qkv.get(),
                   .sizes = model_.proportional_attention ? sizes() : nullptr,
                   .out = m.attended.get(),
                   .class_rows = ranks ? m.class_rows.get<float>() : nullptr,
                   .log_sum = m.log_sum.get<float>(),
                   .batch = memory_.batch,
                   .tokens = block.tokens,
                   .heads = int(config.num_heads),
                   .head_dim = int(config.embed_dim / config.num_heads),
                   .dtype = model_.types.compute},
                  main_);
}

/// proj's input: attention's output, with room behind each row where there is a LoRA term.
const void* TrainStepRunner::projection_input(int index) {
  const TrainLinear& proj = model_.blocks[size_t(index)].proj;
  const BlockMemory& m = memory_.blocks[size_t(index)];
  if (!proj.lora) return m.attended.get();
  const int rows = memory_.batch * model_.blocks[size_t(index)].tokens;
  copy_rows(m.attended.get(), proj.in, m.proj_input.get(), proj.stride, proj.in, rows);
  low_rank_input(proj, index, LinearKind::proj, m.proj_input.get(), rows);
  return m.proj_input.get();
}

/// Rows of the compute type from one stride to another.
void TrainStepRunner::copy_rows(const void* from, int from_stride, void* to, int to_stride, int columns, int rows) {
  const size_t size = cuda::size_of(model_.types.compute);
  PYRA_CUDA(cudaMemcpy2DAsync(to, size_t(to_stride) * size, from, size_t(from_stride) * size, size_t(columns) * size,
                              size_t(rows), cudaMemcpyDeviceToDevice, main_));
}

void TrainStepRunner::merge(int index) {
  const TrainBlock& block = model_.blocks[size_t(index)];
  const BlockMemory& m = memory_.blocks[size_t(index)];
  const nn::VitConfig& config = model_.config;
  const DeviceMerge& merge = *block.merge;
  const bool ranks = merge.kind == DeviceMerge::Kind::rank;
  if (ranks)
    cuda::rank_tokens({.tokens = memory_.stream[size_t(stream_)].get(),
                       .class_rows = m.class_rows.get<float>(),
                       .batch = memory_.batch,
                       .token_count = block.tokens,
                       .heads = int(config.num_heads),
                       .channels = int(config.embed_dim),
                       .dtype = DType::fp32,
                       .prune = merge.prune,
                       .merge = merge.kept,
                       .protected_tokens = int(config.protected_tokens()),
                       .keep = m.keep.get<int32_t>(),
                       .src = m.src.get<int32_t>(),
                       .dst = m.dst.get<int32_t>(),
                       .cosine = m.cosine.get<float>()},
                      main_);
  // Where fc1 has columns behind its input, the norm is written apart and then brought to its stride.
  const bool strided = block.fc1.stride != block.fc1.in;
  void* normed = strided ? m.attention_branch.get() : m.input2.get();
  cuda::merge_tokens({.x = memory_.stream[size_t(stream_)].get(),
                      .sizes = sizes(),
                      .keep = m.keep.get<int32_t>(),
                      .src = m.src.get<int32_t>(),
                      .dst = m.dst.get<int32_t>(),
                      .src_size_scale = ranks ? m.cosine.get<float>() : nullptr,
                      .weighted = merge.weighted,
                      .gate_a = merge.gate_a,
                      .gate_b = merge.gate_b,
                      .gate_weight = merge.gate_weight,
                      .gate_bias = merge.gate_bias,
                      .gate_eps = merge.gate_eps,
                      .batch = memory_.batch,
                      .tokens = block.tokens,
                      .kept = merge.kept,
                      .merged = merge.merged,
                      .channels = int(config.embed_dim),
                      .residual = DType::fp32,
                      .compute = model_.types.compute,
                      .x_out = memory_.stream[size_t(stream_) + 1].get(),
                      .sizes_out = memory_.sizes[size_t(stream_)].get<float>(),
                      .norm_weight = block.norm2.weight,
                      .norm_bias = block.norm2.bias,
                      .norm_eps = float(config.norm_eps),
                      .y = normed,
                      .normalised = m.normalised2.get(),
                      .inverse_deviation = m.inverse2.get<float>()},
                     main_);
  if (strided)
    copy_rows(normed, block.fc1.in, m.input2.get(), block.fc1.stride, block.fc1.in, memory_.batch * merge.kept);
  ++stream_;
}

/// The class tokens' rows of attention's output through proj, and of the stream a copy to go on with.
void TrainStepRunner::choose_class(int index) {
  const TrainBlock& block = model_.blocks[size_t(index)];
  const BlockMemory& m = memory_.blocks[size_t(index)];
  cuda::LinearCall call = call_of(block.proj, m.attended.get(), memory_.batch);
  call.x_stride = block.tokens * block.proj.in;
  call.y = m.attention_branch.get();
  runner_.run(call, main_);
  const size_t row = size_t(model_.config.embed_dim) * sizeof(float);
  PYRA_CUDA(cudaMemcpy2DAsync(memory_.stream[size_t(stream_) + 1].get(), row, memory_.stream[size_t(stream_)].get(),
                              size_t(block.tokens) * row, row, size_t(memory_.batch), cudaMemcpyDeviceToDevice, main_));
  ++stream_;
}

/// From attention's output to norm2's, with the merge between them.
void TrainStepRunner::project_and_add(const TrainBatch& batch, int index) {
  const TrainBlock& block = model_.blocks[size_t(index)];
  const BlockMemory& m = memory_.blocks[size_t(index)];
  if (block.class_alone)
    choose_class(index);
  else
    product(block.proj, projection_input(index), memory_.batch * block.tokens, m.attention_branch.get());
  if (block.merge) {
    if (block.merge->kind == DeviceMerge::Kind::bipartite) PYRA_CUDA(cudaStreamWaitEvent(main_, join_, 0));
    add_and_norm(scale_of(batch, index, 0), &m.attention_branch, block.tokens);
    return merge(index);
  }
  add_and_norm(scale_of(batch, index, 0), &m.attention_branch, block.tokens_after(),
               {&block.norm2, &m.normalised2, &m.inverse2, &m.input2, block.fc1.stride});
}

void TrainStepRunner::forward_block(const TrainBatch& batch, int index) {
  const TrainBlock& block = model_.blocks[size_t(index)];
  const BlockMemory& m = memory_.blocks[size_t(index)];
  const int before = memory_.batch * block.tokens, after = memory_.batch * block.tokens_after();
  // What the block before added to the stream is added here, where its sum is read anyway.
  add_and_norm(scale_of(batch, index - 1, 1), index > 0 ? &memory_.blocks[size_t(index) - 1].hidden_branch : nullptr,
               block.tokens, {&block.norm1, &m.normalised1, &m.inverse1, &m.input1, block.qkv.stride});
  low_rank_input(block.qkv, index, LinearKind::qkv, m.input1.get(), before);
  product(block.qkv, m.input1.get(), before, m.qkv.get());
  if (block.merge && block.merge->kind == DeviceMerge::Kind::bipartite) match(index);
  attend(index);
  project_and_add(batch, index);
  low_rank_input(block.fc1, index, LinearKind::fc1, m.input2.get(), after);
  hidden_rows(index);
  low_rank_input(block.fc2, index, LinearKind::fc2, m.activated.get(), after);
  product(block.fc2, m.activated.get(), after, m.hidden_branch.get());
}

/// fc1 and GELU, both with fc2's stride.
void TrainStepRunner::hidden_rows(int index) {
  const TrainBlock& block = model_.blocks[size_t(index)];
  const BlockMemory& m = memory_.blocks[size_t(index)];
  const int rows = memory_.batch * block.tokens_after();
  cuda::LinearCall call = call_of(block.fc1, m.input2.get(), rows);
  call.y_stride = block.fc2.stride;
  if (exact_gelu_) {
    call.y = m.hidden.get();
    runner_.run(call, main_);
    cuda::gelu_forward(m.hidden.get(), m.activated.get(), model_.types.compute, int64_t(rows) * block.fc2.stride,
                       /*tanh=*/false, main_);
    return;
  }
  call.y = m.activated.get();
  call.activation = m.hidden.get();
  call.epilogue = cuda::Epilogue::gelu_tanh_keep;
  runner_.run(call, main_);
}

void TrainStepRunner::head(const TrainBatch& batch) {
  const nn::VitConfig& config = model_.config;
  const int channels = int(config.embed_dim), tokens = model_.blocks.back().tokens_after();
  add_and_norm(scale_of(batch, int(config.depth) - 1, 1), &memory_.blocks.back().hidden_branch, tokens);
  const float* x = memory_.stream[size_t(stream_)].get<float>();
  int64_t stride = int64_t(tokens) * channels;
  if (config.pool == nn::Pool::avg) {
    cuda::mean_of_tokens(x, DType::fp32, memory_.batch, tokens, int(config.protected_tokens()), channels,
                         memory_.pooled.get<float>(), main_);
    x = memory_.pooled.get<float>();
    stride = channels;
  }
  cuda::norm_rows({.x = x,
                   .x_stride = stride,
                   .weight = model_.norm.weight,
                   .bias = model_.norm.bias,
                   .eps = float(config.norm_eps),
                   .normalised = memory_.features_normalised.get<float>(),
                   .inverse_deviation = memory_.features_inverse.get<float>(),
                   .y = memory_.features.get<float>(),
                   .rows = memory_.batch,
                   .channels = channels},
                  main_);
  runner_.run({.x = memory_.features.get(),
               .weight = model_.head_weight,
               .bias = model_.head_bias,
               .y = memory_.logits.get(),
               .rows = memory_.batch,
               .in = channels,
               .out = int(config.num_classes),
               .compute = DType::fp32,
               .result = DType::fp32},
              main_);
  cuda::cross_entropy({.logits = memory_.logits.get<float>(),
                       .labels = batch.labels,
                       .d_logits = memory_.d_logits.get<float>(),
                       .status = batch.status,
                       .batch = memory_.batch,
                       .classes = int(config.num_classes),
                       .teacher = batch.teacher,
                       .teacher_weight = float(batch.distillation.weight),
                       .temperature = float(batch.distillation.temperature)},
                      main_);
}

void TrainStepRunner::enqueue(const TrainBatch& batch) {
  stream_ = 0;
  aside_runs_ = false;
  embed(batch);
  for (int i = 0; i < int(model_.blocks.size()); ++i) forward_block(batch, i);
  head(batch);
  head_backward(batch);
  for (int i = int(model_.blocks.size()) - 1; i >= 0; --i) backward_block(batch, i);
  if (needed(kEmbedPosition)) backward_embed();
  end_aside();
}

}  // namespace pyra::engine
