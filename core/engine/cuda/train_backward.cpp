#include "base/error.h"
#include "engine/cuda/train_step.h"
#include "kernels/cuda/attention_backward.h"
#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/cross_entropy.h"
#include "kernels/cuda/gelu_train.h"
#include "kernels/cuda/merge_backward.h"
#include "kernels/cuda/norm_train.h"

namespace pyra::engine {

namespace cuda = kernels::cuda;
using sdk::LinearKind;

/// Room for a tensor's partial sums, and word of it to the optimiser.
float* TrainStepRunner::add_partial(TrainedSlot slot, int chunks, int64_t chunk_stride) {
  DeviceMemory memory(size_t(chunks) * size_t(chunk_stride) * sizeof(float));
  PYRA_CUDA(cudaMemset(memory.get(), 0, memory.bytes()));
  memory_.bytes += memory.bytes();
  float* partial = memory.get<float>();
  memory_.partials.push_back(std::move(memory));
  point_to_partial(slot, partial, chunks, chunk_stride);
  return partial;
}

void TrainStepRunner::point_to_partial(TrainedSlot slot, float* partial, int chunks, int64_t chunk_stride) {
  cuda::Segment& segment = model_.segment(slot);
  segment.partial = partial;
  segment.chunks = chunks;
  segment.chunk_stride = chunk_stride;
}

void TrainStepRunner::plan_norm(const TrainNorm& norm, int rows) {
  const int channels = int(model_.config.embed_dim);
  for (const TrainedSlot slot : {norm.weight_slot, norm.bias_slot})
    if (slot) add_partial(slot, cuda::column_sum_chunks(rows), channels);
}

void TrainStepRunner::plan_linear(const TrainLinear& layer, int rows) {
  if (layer.bias_slot) add_partial(layer.bias_slot, cuda::column_sum_chunks(rows), layer.out);
  if (!layer.lora) return;
  const LoraTerm& term = *layer.lora;
  add_partial(term.a_slot, cuda::lora_chunks(rows), int64_t(term.rank) * layer.in);
  add_partial(term.b_slot, cuda::lora_chunks(rows), int64_t(term.rank) * layer.out);
}

void TrainStepRunner::plan_gate(const TrainBlock& block) {
  if (!block.gate_a) return;
  // Not of the merge, which the last block may have dropped.
  const int channels = int(model_.config.embed_dim), merged = int(model_.segment(block.gate_a).count);
  const int row = merged + 3 * channels;
  if (!block.gate_b || !block.gate_weight || !block.gate_bias)
    fail(ExitCode::usage, "a gate of which only a part trains; train on the CPU: --device cpu");
  float* partial = add_partial(block.gate_a, memory_.batch, row);
  point_to_partial(block.gate_b, partial + merged, memory_.batch, row);
  point_to_partial(block.gate_weight, partial + merged + channels, memory_.batch, row);
  point_to_partial(block.gate_bias, partial + merged + 2 * channels, memory_.batch, row);
}

void TrainStepRunner::plan_partials() {
  const nn::VitConfig& config = model_.config;
  if (model_.patch_embed.bias_slot)
    add_partial(model_.patch_embed.bias_slot, cuda::column_sum_chunks(memory_.batch * int(config.patches())),
                model_.patch_embed.out);
  for (const TrainBlock& block : model_.blocks) {
    const int before = memory_.batch * block.tokens, after = memory_.batch * block.tokens_after();
    plan_norm(block.norm1, before);
    plan_linear(block.qkv, before);
    plan_linear(block.proj, block.class_alone ? after : before);
    plan_gate(block);
    plan_norm(block.norm2, after);
    plan_linear(block.fc1, after);
    plan_linear(block.fc2, after);
  }
  plan_norm(model_.norm, memory_.batch);
  if (model_.head_weight_slot) add_partial(model_.head_weight_slot, 1, config.num_classes * config.embed_dim);
  if (model_.head_bias_slot) add_partial(model_.head_bias_slot, 1, config.num_classes);
}

float* TrainStepRunner::partial_of(TrainedSlot slot) {
  return slot ? const_cast<float*>(model_.segment(slot).partial) : nullptr;
}

/// Sums of the columns of d, or of d * factor: gradients of biases and of norms' weights.
void TrainStepRunner::sum_columns(TrainedSlot slot, const void* d, DType dtype, int64_t stride, int rows, int channels,
                                  const void* factor) {
  if (!slot) return;
  cuda::column_sums({.d = d,
                     .d_stride = stride,
                     .dtype = dtype,
                     .factor = factor,
                     .rows = rows,
                     .channels = channels,
                     .partial = partial_of(slot)},
                    main_);
}

/// dx = dy W, with the columns behind; `activation`: times GELU's slope there. dx_stride 0: rows follow each other.
void TrainStepRunner::product_backward(const TrainLinear& layer, const void* dy, int64_t dy_stride, int rows, void* dx,
                                       const void* activation, int64_t dx_stride) {
  cuda::LinearCall call = call_of(layer, dy, rows);
  call.bias = nullptr;
  call.y = dx;
  call.in = layer.out;
  call.out = layer.stride;
  call.x_stride = int(dy_stride);
  call.y_stride = int(dx_stride);
  call.transposed = true;
  if (activation) {
    call.activation = const_cast<void*>(activation);
    call.epilogue = cuda::Epilogue::gelu_tanh_back;
  }
  runner_.run(call, main_);
}

/// A stream that goes on from here beside main_, for kernels whose results only the optimiser reads. What they read
/// must stay as it is for the rest of the step.
cudaStream_t TrainStepRunner::begin_aside() {
  PYRA_CUDA(cudaEventRecord(fork_, main_));
  PYRA_CUDA(cudaStreamWaitEvent(aside_, fork_, 0));
  aside_runs_ = true;
  return aside_;
}

/// main_ waits for all that was put aside.
void TrainStepRunner::end_aside() {
  if (!aside_runs_) return;
  PYRA_CUDA(cudaEventRecord(join_, aside_));
  PYRA_CUDA(cudaStreamWaitEvent(main_, join_, 0));
  aside_runs_ = false;
}

/// Of a layer's LoRA term the gradient of B, from dy and what the forward pass left of drop(x) Aᵀ.
void TrainStepRunner::b_gradient(const TrainLinear& layer, int block, LinearKind kind, const void* dy,
                                 int64_t dy_stride, int rows, cudaStream_t stream) {
  const LoraTerm& term = *layer.lora;
  const auto compute = model_.types.compute;
  for (const auto& [begin, end] : term.b_rows)
    cuda::thin_gradient({.dy = static_cast<const char*>(dy) + size_t(begin) * cuda::size_of(compute),
                         .dy_stride = dy_stride,
                         .h = memory_.blocks[size_t(block)].low[size_t(kind)].get(),
                         .h_stride = term.padded,
                         .scale = term.scale,
                         .b_partial = partial_of(term.b_slot) + int64_t(begin) * term.rank,
                         .chunk_stride = int64_t(term.rank) * layer.out,
                         .rows = rows,
                         .out = end - begin,
                         .rank = term.rank,
                         .compute = compute},
                        stream);
}

/// Of a layer's LoRA term the gradient of A, from the layer's input; d_input holds dx and, behind it, the gradient of
/// the thin product, and, if needed, gets what flows through A. `norm`: the input is x * weight + bias.
void TrainStepRunner::a_gradient(const TrainLinear& layer, const void* x, int64_t x_stride, const TrainNorm* norm,
                                 void* d_input, int rows, bool input_needed, cudaStream_t stream) {
  const LoraTerm& term = *layer.lora;
  const auto compute = model_.types.compute;
  cuda::lora_backward({.x = x,
                       .x_stride = x_stride,
                       .norm_weight = norm ? norm->weight : nullptr,
                       .norm_bias = norm ? norm->bias : nullptr,
                       .d_h = static_cast<char*>(d_input) + size_t(layer.in) * cuda::size_of(compute),
                       .d_h_stride = layer.stride,
                       .a = term.a,
                       .d_x = input_needed ? d_input : nullptr,
                       .d_x_stride = layer.stride,
                       .a_partial = partial_of(term.a_slot),
                       .rows = rows,
                       .in = layer.in,
                       .rank = term.rank,
                       .dropout = term.dropout,
                       .compute = compute},
                      stream);
}

/// Both gradients and what flows through A, one after the other.
void TrainStepRunner::low_rank_backward(const TrainLinear& layer, int block, LinearKind kind, const void* dy,
                                        int64_t dy_stride, const void* x, int64_t x_stride, const TrainNorm* norm,
                                        void* d_input, int rows) {
  if (!layer.lora) return;
  b_gradient(layer, block, kind, dy, dy_stride, rows, main_);
  a_gradient(layer, x, x_stride, norm, d_input, rows, true, main_);
}

void TrainStepRunner::head_backward(const TrainBatch& batch) {
  const nn::VitConfig& config = model_.config;
  const int channels = int(config.embed_dim), last = int(config.depth) - 1;
  const int tokens = model_.blocks.back().tokens_after();
  cuda::head_gradient({.d_logits = memory_.d_logits.get<float>(),
                       .features = memory_.features.get<float>(),
                       .d_weight = partial_of(model_.head_weight_slot),
                       .d_bias = partial_of(model_.head_bias_slot),
                       .batch = memory_.batch,
                       .classes = int(config.num_classes),
                       .channels = channels},
                      begin_aside());
  runner_.run({.x = memory_.d_logits.get(),
               .weight = model_.head_weight,
               .y = memory_.d_features.get(),
               .rows = memory_.batch,
               .in = int(config.num_classes),
               .out = channels,
               .transposed = true,
               .compute = DType::fp32,
               .result = DType::fp32},
              main_);
  const void* d = memory_.d_features.get();
  sum_columns(model_.norm.bias_slot, d, DType::fp32, channels, memory_.batch, channels);
  sum_columns(model_.norm.weight_slot, d, DType::fp32, channels, memory_.batch, channels,
              memory_.features_normalised.get());
  if (!needed(position_of(last, Place::fc2))) return;
  cuda::norm_rows_backward({.d_y = memory_.d_features.get<float>(),
                            .normalised = memory_.features_normalised.get<float>(),
                            .inverse_deviation = memory_.features_inverse.get<float>(),
                            .weight = model_.norm.weight,
                            .batch = memory_.batch,
                            .tokens = tokens,
                            .channels = channels,
                            .first = config.pool == nn::Pool::avg ? int(config.protected_tokens()) : 0,
                            .pooled = config.pool == nn::Pool::avg,
                            .d_x = memory_.d_stream[size_t(stream_)].get<float>()},
                           main_);
  cuda::scale_rows({.d_x = memory_.d_stream[size_t(stream_)].get<float>(),
                    .branch_scale = scale_of(batch, last, 1),
                    .rows_per_image = tokens,
                    .rows = memory_.batch * tokens,
                    .channels = channels,
                    .out = memory_.blocks.back().d_hidden_branch.get(),
                    .compute = model_.types.compute},
                   main_);
}

/// From the gradient of the hidden branch to that of norm2's output.
void TrainStepRunner::backward_mlp(int index) {
  const TrainBlock& block = model_.blocks[size_t(index)];
  const BlockMemory& m = memory_.blocks[size_t(index)];
  const int rows = memory_.batch * block.tokens_after(), channels = int(model_.config.embed_dim);
  const auto compute = model_.types.compute;
  void *d_branch = m.d_hidden_branch.get(), *d_hidden = m.d_hidden.get();
  const int64_t count = int64_t(rows) * block.fc2.stride;
  sum_columns(block.fc2.bias_slot, d_branch, compute, channels, rows, channels);
  const bool inside = !exact_gelu_ && !block.fc2.lora;
  product_backward(block.fc2, d_branch, channels, rows, d_hidden, inside ? m.hidden.get() : nullptr);
  if (block.fc2.lora) {
    cuda::gelu_forward(m.hidden.get(), m.fc2_input.get(), compute, count, !exact_gelu_, main_);
    low_rank_backward(block.fc2, index, LinearKind::fc2, d_branch, channels, m.fc2_input.get(), block.fc2.stride,
                      nullptr, d_hidden, rows);
  }
  if (!needed(position_of(index, Place::fc1))) return;
  if (!inside) cuda::gelu_backward(m.hidden.get(), d_hidden, compute, count, !exact_gelu_, main_);
  sum_columns(block.fc1.bias_slot, d_hidden, compute, block.fc2.stride, rows, block.fc1.out);
  if (block.fc1.lora || needed(position_of(index, Place::norm2)))
    product_backward(block.fc1, d_hidden, block.fc2.stride, rows, m.d_input2.get());
  low_rank_backward(block.fc1, index, LinearKind::fc1, d_hidden, block.fc2.stride, m.normalised2.get(), channels,
                    &block.norm2, m.d_input2.get(), rows);
}

/// To the gradient of what attention added.
void TrainStepRunner::backward_norm2_and_merge(const TrainBatch& batch, int index) {
  const TrainBlock& block = model_.blocks[size_t(index)];
  const BlockMemory& m = memory_.blocks[size_t(index)];
  const int rows = memory_.batch * block.tokens_after(), channels = int(model_.config.embed_dim);
  norm_backward(block.norm2, m.normalised2, m.inverse2, m.d_input2.get(), block.fc1.stride, rows, block.tokens_after(),
                block.merge ? nullptr : m.d_attention_branch.get(), scale_of(batch, index, 0));
  if (block.class_alone) spread_class(index);
  if (!block.merge || !needed(position_of(index, Place::merge))) return;
  const DeviceMerge& merge = *block.merge;
  --stream_;
  cuda::merge_backward({.x = memory_.stream[size_t(stream_)].get<float>(),
                        .sizes = sizes(),
                        .keep = m.keep.get<int32_t>(),
                        .src = m.src.get<int32_t>(),
                        .dst = m.dst.get<int32_t>(),
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
                        .channels = channels,
                        .d_out = memory_.d_stream[size_t(stream_) + 1].get<float>(),
                        .d_x = memory_.d_stream[size_t(stream_)].get<float>(),
                        .d_branch = m.d_attention_branch.get(),
                        .branch_scale = scale_of(batch, index, 0),
                        .compute = model_.types.compute,
                        .d_gate = partial_of(block.gate_a)},
                       main_);
}

void TrainStepRunner::norm_backward(const TrainNorm& norm, const DeviceSpan& normalised, const DeviceSpan& inverse,
                                    const void* d_y, int64_t stride, int rows, int tokens, void* d_branch,
                                    const float* scale) {
  const int channels = int(model_.config.embed_dim);
  const auto compute = model_.types.compute;
  sum_columns(norm.bias_slot, d_y, compute, stride, rows, channels);
  sum_columns(norm.weight_slot, d_y, compute, stride, rows, channels, normalised.get());
  cuda::norm_backward({.d_y = d_y,
                       .d_y_stride = stride,
                       .normalised = normalised.get(),
                       .inverse_deviation = inverse.get<float>(),
                       .weight = norm.weight,
                       .d_x = memory_.d_stream[size_t(stream_)].get<float>(),
                       .d_branch = d_branch,
                       .branch_scale = scale,
                       .rows_per_image = tokens,
                       .rows = rows,
                       .channels = channels,
                       .compute = compute},
                      main_);
}

/// qkv's LoRA term: its gradients, and what flows through A where something below trains.
void TrainStepRunner::qkv_gradients(int index) {
  const TrainBlock& block = model_.blocks[size_t(index)];
  const BlockMemory& m = memory_.blocks[size_t(index)];
  if (!block.qkv.lora) return;
  const int rows = memory_.batch * block.tokens;
  const bool adds = needed(position_of(index, Place::norm1));
  cudaStream_t stream = gradients_aside(model_, index) ? begin_aside() : main_;
  b_gradient(block.qkv, index, LinearKind::qkv, m.d_qkv.get(), block.qkv.out, rows, stream);
  a_gradient(block.qkv, m.normalised1.get(), block.qkv.in, &block.norm1, m.d_input1.get(), rows, adds,
             adds ? main_ : stream);
}

/// From the class tokens' gradient of the stream to that of all tokens: zero for the others.
void TrainStepRunner::spread_class(int index) {
  const TrainBlock& block = model_.blocks[size_t(index)];
  const size_t row = size_t(model_.config.embed_dim) * sizeof(float), images = size_t(memory_.batch);
  --stream_;
  void* const all = memory_.d_stream[size_t(stream_)].get();
  PYRA_CUDA(cudaMemsetAsync(all, 0, images * size_t(block.tokens) * row, main_));
  PYRA_CUDA(cudaMemcpy2DAsync(all, size_t(block.tokens) * row, memory_.d_stream[size_t(stream_) + 1].get(), row, row,
                              images, cudaMemcpyDeviceToDevice, main_));
}

/// To the gradient of attention's output, with proj's stride.
void TrainStepRunner::projection_backward(int index) {
  const TrainBlock& block = model_.blocks[size_t(index)];
  const TrainLinear& proj = block.proj;
  const BlockMemory& m = memory_.blocks[size_t(index)];
  const int rows = memory_.batch * (block.class_alone ? 1 : block.tokens), channels = proj.out;
  const auto compute = model_.types.compute;
  void *d_branch = m.d_attention_branch.get(), *d_attended = m.d_attended.get();
  sum_columns(proj.bias_slot, d_branch, compute, channels, rows, channels);
  if (!block.class_alone) {
    product_backward(proj, d_branch, channels, rows, d_attended);
    return low_rank_backward(proj, index, LinearKind::proj, d_branch, channels, m.attended.get(), channels, nullptr,
                             d_attended, rows);
  }
  const int64_t image = int64_t(block.tokens) * proj.in;
  PYRA_CUDA(cudaMemsetAsync(d_attended, 0, size_t(memory_.batch * image) * cuda::size_of(compute), main_));
  product_backward(proj, d_branch, channels, rows, d_attended, nullptr, image);
}

/// To the gradient of norm1's output.
void TrainStepRunner::backward_attention(int index) {
  const TrainBlock& block = model_.blocks[size_t(index)];
  const BlockMemory& m = memory_.blocks[size_t(index)];
  const nn::VitConfig& config = model_.config;
  const int rows = memory_.batch * block.tokens, channels = int(config.embed_dim);
  const auto compute = model_.types.compute;
  projection_backward(index);
  if (!needed(position_of(index, Place::qkv))) return;
  const void* d_attended = m.d_attended.get();
  if (block.proj.stride != channels) {
    copy_rows(d_attended, block.proj.stride, m.packed_attended.get(), channels, channels, rows);
    d_attended = m.packed_attended.get();
  }
  cuda::attention_backward({.qkv = m.qkv.get(),
                            .sizes = model_.proportional_attention ? sizes() : nullptr,
                            .out = m.attended.get(),
                            .log_sum = m.log_sum.get<float>(),
                            .d_out = d_attended,
                            .d_qkv = m.d_qkv.get(),
                            .batch = memory_.batch,
                            .tokens = block.tokens,
                            .heads = int(config.num_heads),
                            .head_dim = int(config.embed_dim / config.num_heads),
                            .dtype = compute},
                           main_);
  sum_columns(block.qkv.bias_slot, m.d_qkv.get(), compute, block.qkv.out, rows, block.qkv.out);
  if (needed(position_of(index, Place::norm1)))
    product_backward(block.qkv, m.d_qkv.get(), block.qkv.out, rows, m.d_input1.get());
  else if (block.qkv.lora)
    low_columns_backward(block.qkv, m.d_qkv.get(), rows, m.d_input1.get());
  qkv_gradients(index);
}

/// Of dx = dy W only the columns behind: nothing below trains.
void TrainStepRunner::low_columns_backward(const TrainLinear& layer, const void* dy, int rows, void* d_input) {
  const size_t behind = size_t(layer.in) * cuda::size_of(model_.types.compute);
  cuda::LinearCall call = call_of(layer, dy, rows);
  call.bias = nullptr;
  call.weight = static_cast<const char*>(layer.weight) + behind;
  call.y = static_cast<char*>(d_input) + behind;
  call.in = layer.out;
  call.out = layer.lora->padded;
  call.weight_stride = call.y_stride = layer.stride;
  call.x_stride = layer.out;
  call.transposed = true;
  runner_.run(call, main_);
}

void TrainStepRunner::backward_block(const TrainBatch& batch, int index) {
  const TrainBlock& block = model_.blocks[size_t(index)];
  if (!needed(position_of(index, Place::fc2))) return;
  backward_mlp(index);
  if (!needed(position_of(index, Place::norm2))) return;
  backward_norm2_and_merge(batch, index);
  if (!needed(position_of(index, Place::proj))) return;
  backward_attention(index);
  if (!needed(position_of(index, Place::norm1))) return;
  const BlockMemory& m = memory_.blocks[size_t(index)];
  norm_backward(block.norm1, m.normalised1, m.inverse1, m.d_input1.get(), block.qkv.stride,
                memory_.batch * block.tokens, block.tokens,
                index > 0 ? memory_.blocks[size_t(index) - 1].d_hidden_branch.get() : nullptr,
                scale_of(batch, index - 1, 1));
}

/// The patch embedding's bias: the stream's gradient, without the prefix tokens.
void TrainStepRunner::backward_embed() {
  const nn::VitConfig& config = model_.config;
  const int patches = int(config.patches()), channels = int(config.embed_dim);
  const auto prefix = size_t(config.protected_tokens());
  const size_t row = size_t(channels) * sizeof(float);
  PYRA_CUDA(cudaMemcpy2DAsync(memory_.patch_gradient.get(), size_t(patches) * row,
                              memory_.d_stream[0].get<char>() + prefix * row, size_t(config.tokens()) * row,
                              size_t(patches) * row, size_t(memory_.batch), cudaMemcpyDeviceToDevice, main_));
  sum_columns(model_.patch_embed.bias_slot, memory_.patch_gradient.get(), DType::fp32, channels,
              memory_.batch * patches, channels);
}

}  // namespace pyra::engine
