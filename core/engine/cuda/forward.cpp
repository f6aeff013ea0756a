#include "engine/cuda/forward.h"

#include <algorithm>

#include "base/error.h"
#include "kernels/cuda/embed.h"
#include "kernels/cuda/layer_norm.h"
#include "kernels/cuda/match.h"
#include "kernels/cuda/merge.h"
#include "kernels/cuda/norm_linear.h"
#include "kernels/cuda/rank.h"

namespace pyra::engine {

namespace cuda = kernels::cuda;

namespace {

constexpr int kTalliesOfBlock = 2;

/// `call` of this layer.
cuda::LinearCall layer_call(const DeviceLinear& layer, cuda::LinearCall call) {
  call.weight = layer.weight;
  call.bias = layer.bias;
  call.in = layer.in;
  call.out = layer.out;
  return call;
}

}  // namespace

/// All of them are there for the whole of a pass.
SpanPlan Activations::plan(const DeviceModel& model, int images) {
  const nn::VitConfig& config = model.config;
  const size_t n = size_t(config.tokens()), c = size_t(config.embed_dim), compute = cuda::size_of(model.types.compute);
  const size_t patch_values = size_t(config.patches() * 3 * config.patch_size * config.patch_size);
  SpanPlan plan;
  const auto add = [&](DeviceSpan& span, size_t image_bytes) { plan.add(span, size_t(images) * image_bytes, 0, 0); };
  for (DeviceSpan& span : stream) add(span, n * c * cuda::size_of(model.types.residual));
  add(rows, n * c * compute);
  add(wide, std::max(n * std::max(3 * c, size_t(config.mlp_dim)), patch_values) * compute);
  for (DeviceSpan* span : {&sizes[0], &sizes[1], &keep, &src, &dst, &cosine}) add(*span, n * 4);
  add(class_rows, size_t(config.num_heads) * n * 4);
  for (DeviceSpan* span : {&pooled, &features}) add(*span, c * 4);
  add(logits, size_t(config.num_classes) * 4);
  plan.add(tallies, model.blocks.size() * kTalliesOfBlock * sizeof(int), 0, 0);
  plan.place();
  return plan;
}

Activations::Activations(const DeviceModel& model, int images) : batch(images) {
  const SpanPlan plan = this->plan(model, images);
  arena_ = DeviceMemory(plan.bytes());
  plan.hand_out(arena_.get<char>());
}

size_t Activations::bytes_for(const DeviceModel& model, int batch) {
  Activations unused;
  return unused.plan(model, batch).bytes();
}

/// Where a pass stands: which of each pair of buffers holds the tokens, how many there are.
struct Forward::State {
  int batch;
  const Activations& memory;
  bool one_stream;  ///< matching goes in line, and what waits for it by a tally
  int tokens = 0;
  int now = 0;               ///< of memory.stream and memory.sizes
  bool merged = false;       ///< sizes are written, and differ from one
  bool normed = false;       ///< memory.rows holds the next block's norm1 already
  cuda::Tally planned = {};  ///< of the block's plan; none where it is in front of the merge

  [[nodiscard]] void* x() const { return memory.stream[size_t(now)].get(); }
  [[nodiscard]] const float* sizes() const { return merged ? memory.sizes[size_t(now)].get<float>() : nullptr; }
  [[nodiscard]] int rows() const { return batch * tokens; }
};

Forward::Forward(const nn::Vit& model, const DeviceModel& device_model, const nn::Preprocess& preprocess,
                 bool exact_gelu, std::shared_ptr<cuda::GemmCache> cache)
    : model_(device_model),
      preprocess_(preprocess),
      exact_gelu_(exact_gelu || device_model.types.compute == DType::fp32),
      runner_(std::move(cache)) {
  for (cudaStream_t* stream : {&main_, &side_}) PYRA_CUDA(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking));
  PYRA_CUDA(cudaEventCreateWithFlags(&fork_, cudaEventDisableTiming));
  PYRA_CUDA(cudaEventCreateWithFlags(&join_, cudaEventDisableTiming));
  for (size_t i = 0; i < model_.blocks.size(); ++i) {
    const DeviceBlock& block = model_.blocks[i];
    const bool by_host = block.merge && block.merge->kind == DeviceMerge::Kind::by_host;
    planners_.push_back(by_host ? std::make_unique<HostPlanner>(model, int(i), block.tokens, block.merge->kept)
                                : nullptr);
  }
}

Forward::~Forward() {
  for (cudaEvent_t event : {fork_, join_})
    if (event) (void)cudaEventDestroy(event);
  for (cudaStream_t stream : {main_, side_})
    if (stream) (void)cudaStreamDestroy(stream);
}

std::exception_ptr Forward::take_failure() {
  std::exception_ptr first;
  for (const auto& planner : planners_) {
    if (!planner) continue;
    const std::exception_ptr failure = planner->take_failure();
    if (!first) first = failure;
  }
  return first;
}

void Forward::read_images(const DeviceImages& images, int batch, const Activations& activations) const {
  cuda::PatchCall call{.images = images.data,
                       .is_float = images.is_float,
                       .batch = batch,
                       .side = int(model_.config.image_size),
                       .patch = int(model_.config.patch_size),
                       .out = activations.wide.get(),
                       .compute = model_.types.compute};
  std::copy_n(preprocess_.mean.begin(), 3, call.mean);
  std::copy_n(preprocess_.std.begin(), 3, call.std);
  cuda::extract_patches(call, main_);
}

void Forward::linear(const DeviceLinear& layer, cuda::LinearCall call, bool gelu) {
  const bool tanh = gelu && !exact_gelu_;
  call = layer_call(layer, call);
  call.epilogue = tanh ? cuda::Epilogue::gelu_tanh : cuda::Epilogue::none;
  runner_.run(call, main_);
  if (gelu && !tanh) cuda::gelu_erf(call.y, call.result, int64_t(call.rows) * layer.out, main_);
}

/// Operands of the compute type, the result of that type or added to the residual stream.
cuda::LinearCall Forward::rows_to_rows(const void* x, int rows, void* y, bool onto_stream) const {
  return {.x = x,
          .residual = onto_stream ? y : nullptr,
          .y = y,
          .rows = rows,
          .compute = model_.types.compute,
          .result = onto_stream ? model_.types.residual : model_.types.compute,
          .math = model_.types.tf32 ? cuda::MatrixMath::tf32 : cuda::MatrixMath::exact};
}

/// A layer of a block, rows_to_rows().
void Forward::block_linear(const char* name, const DeviceLinear& layer, const cuda::LinearCall& call, bool gelu) {
  linear(layer, call, gelu);
  const double in = layer.in, out = layer.out, rows = call.rows;
  const double moved = (call.residual ? 2.0 : 1.0) * double(cuda::size_of(call.result));
  mark(name, (rows * in + in * out) * double(cuda::size_of(call.compute)) + rows * out * moved, 2.0 * rows * in * out);
}

void Forward::mark(const char* name, double bytes, double operations) {
  if (timer_) timer_->mark(name, bytes, operations, main_);
}

void Forward::norm(State& state, const DeviceNorm& weights, void* y) {
  const int channels = int(model_.config.embed_dim);
  cuda::layer_norm({.x = state.x(),
                    .row_stride = channels,
                    .rows = state.rows(),
                    .channels = channels,
                    .weight = weights.weight,
                    .bias = weights.bias,
                    .eps = float(model_.config.norm_eps),
                    .y = y,
                    .residual = model_.types.residual,
                    .compute = model_.types.compute},
                   main_);
  mark("norm", double(state.rows()) * channels * model_.types.row_bytes());
}

void Forward::embed(State& state) {
  const nn::VitConfig& config = model_.config;
  const int patches = int(config.patches());
  // The stream's other half is free until the first merge.
  void* embedded = state.memory.stream[1].get();
  block_linear("patch embedding", model_.patch_embed,
               rows_to_rows(state.memory.wide.get(), state.batch * patches, embedded, /*onto_stream=*/false));
  cuda::assemble_tokens({.embedded = embedded,
                         .prefix = model_.prefix,
                         .positions = model_.positions,
                         .batch = state.batch,
                         .patches = patches,
                         .protected_tokens = int(config.protected_tokens()),
                         .channels = int(config.embed_dim),
                         .x = state.x(),
                         .norm_weight = model_.blocks[0].norm1.weight,
                         .norm_bias = model_.blocks[0].norm1.bias,
                         .norm_eps = float(config.norm_eps),
                         .y = state.memory.rows.get(),
                         .residual = model_.types.residual,
                         .compute = model_.types.compute,
                         .tallies = state.memory.tallies.get<int>(),
                         .tally_count = int(model_.blocks.size()) * kTalliesOfBlock},
                        main_);
  state.tokens = int(config.tokens());
  state.normed = true;
  mark("assemble", double(state.rows()) * double(config.embed_dim) *
                       (model_.types.row_bytes() + double(cuda::size_of(model_.types.compute))));
}

cuda::AttentionCall Forward::attention(const State& state, bool class_rows) const {
  const nn::VitConfig& config = model_.config;
  return {.qkv = state.memory.wide.get(),
          .sizes = model_.proportional_attention ? state.sizes() : nullptr,
          .out = state.memory.rows.get(),
          .class_rows = class_rows ? state.memory.class_rows.get<float>() : nullptr,
          .batch = state.batch,
          .tokens = state.tokens,
          .heads = int(config.num_heads),
          .head_dim = int(config.embed_dim / config.num_heads),
          .dtype = model_.types.compute};
}

int Forward::attend(const State& state, const cuda::AttentionCall& call) {
  const int blocks = cuda::attention(call, main_);
  const double elements = double(state.rows()) * double(model_.config.embed_dim);
  mark("attention", 4 * elements * double(cuda::size_of(model_.types.compute)), 4 * elements * state.tokens);
  return blocks;
}

cuda::LinearCall Forward::projection(const State& state) const {
  return rows_to_rows(state.memory.rows.get(), state.rows(), state.x(), /*onto_stream=*/true);
}

/// Matching needs the keys alone, so it runs beside attention and projection: on a stream of its own or, where launches
/// overlap anyway, in line with them (dependent.cuh), which joins no streams and so lets the merge start early. In line
/// it stands behind attention if the projection can wait for that one's tally, and else in front of it.
void Forward::attend_and_match(State& state, const DeviceBlock& block, int index) {
  const DeviceMerge& merge = *block.merge;
  cuda::AttentionCall attended = attention(state, /*class_rows=*/false);
  cuda::LinearCall projected = projection(state);
  if (!state.one_stream || !cuda::attention_overlaps(attended)) {
    const cudaStream_t stream = timer_ ? main_ : side_;
    PYRA_CUDA(cudaEventRecord(fork_, main_));
    PYRA_CUDA(cudaStreamWaitEvent(stream, fork_, 0));
    match(state, merge, stream, nullptr, false);
    PYRA_CUDA(cudaEventRecord(join_, stream));
    attend(state, attended);
    block_linear("proj", block.proj, projected);
    return PYRA_CUDA(cudaStreamWaitEvent(main_, join_, 0));
  }
  int *attended_blocks = state.memory.tallies.get<int>() + index * kTalliesOfBlock, *plans = attended_blocks + 1;
  if (cuda::awaits_tally(layer_call(block.proj, projected))) {
    attended.done = attended_blocks;
    const int blocks = attend(state, attended);
    match(state, merge, main_, plans, /*qkv_is_there=*/blocks > 0);
    if (blocks > 0) projected.x_there = {attended_blocks, blocks};
  } else {
    match(state, merge, main_, plans, /*qkv_is_there=*/false);
    attended.qkv_is_there = true;
    attend(state, attended);
  }
  block_linear("proj", block.proj, projected);
  state.planned = {plans, state.batch};
}

/// ToMe's plan from the keys.
void Forward::match(const State& state, const DeviceMerge& merge, cudaStream_t stream, int* done, bool qkv_is_there) {
  const nn::VitConfig& config = model_.config;
  const Activations& memory = state.memory;
  const int channels = int(config.embed_dim);
  cuda::match_bipartite({.qkv = memory.wide.get(),
                         .batch = state.batch,
                         .tokens = state.tokens,
                         .heads = int(config.num_heads),
                         .head_dim = int(config.embed_dim / config.num_heads),
                         .dtype = model_.types.compute,
                         .r = merge.merged,
                         .protected_tokens = int(config.protected_tokens()),
                         .in_side_a = merge.in_side_a,
                         .keep = memory.keep.get<int32_t>(),
                         .src = memory.src.get<int32_t>(),
                         .dst = memory.dst.get<int32_t>(),
                         .ahead = {{merge.gate_a, merge.merged},
                                   {merge.gate_b, channels},
                                   {merge.gate_weight, channels},
                                   {merge.gate_bias, channels}},
                         .done = done,
                         .qkv_is_there = qkv_is_there},
                        stream);
  mark("match", double(state.rows()) * double(config.embed_dim) * double(cuda::size_of(model_.types.compute)));
}

/// DiffRate's plan, from the tokens behind attention and what the class token paid them.
void Forward::rank(const State& state, const DeviceMerge& merge) {
  const nn::VitConfig& config = model_.config;
  const Activations& memory = state.memory;
  cuda::rank_tokens({.tokens = state.x(),
                     .class_rows = memory.class_rows.get<float>(),
                     .batch = state.batch,
                     .token_count = state.tokens,
                     .heads = int(config.num_heads),
                     .channels = int(config.embed_dim),
                     .dtype = model_.types.residual,
                     .prune = merge.prune,
                     .merge = merge.kept,
                     .protected_tokens = int(config.protected_tokens()),
                     .keep = memory.keep.get<int32_t>(),
                     .src = memory.src.get<int32_t>(),
                     .dst = memory.dst.get<int32_t>(),
                     .cosine = memory.cosine.get<float>()},
                    main_);
  mark("rank",
       double(state.batch) * merge.prune * double(config.embed_dim) * double(cuda::size_of(model_.types.residual)));
}

void Forward::merge(State& state, const DeviceBlock& block, int index) {
  const DeviceMerge& merge = *block.merge;
  const Activations& memory = state.memory;
  const int next = 1 - state.now;
  cuda::MergeCall call{.x = state.x(),
                       .sizes = state.sizes(),
                       .keep = memory.keep.get<int32_t>(),
                       .src = memory.src.get<int32_t>(),
                       .dst = memory.dst.get<int32_t>(),
                       .src_size_scale = merge.kind == DeviceMerge::Kind::rank ? memory.cosine.get<float>() : nullptr,
                       .weighted = merge.weighted,
                       .gate_a = merge.gate_a,
                       .gate_b = merge.gate_b,
                       .gate_weight = merge.gate_weight,
                       .gate_bias = merge.gate_bias,
                       .gate_eps = merge.gate_eps,
                       .batch = state.batch,
                       .tokens = state.tokens,
                       .kept = merge.kept,
                       .merged = merge.merged,
                       .channels = int(model_.config.embed_dim),
                       .residual = model_.types.residual,
                       .compute = model_.types.compute,
                       .x_out = memory.stream[size_t(next)].get(),
                       .sizes_out = memory.sizes[size_t(next)].get<float>(),
                       .norm_weight = block.norm2.weight,
                       .norm_bias = block.norm2.bias,
                       .norm_eps = float(model_.config.norm_eps),
                       .y = memory.rows.get(),
                       .plan_there = state.planned};
  if (HostPlanner* planner = planners_[size_t(index)].get())
    planner->enqueue({.stream = state.x(),
                      .sizes = state.sizes(),
                      .qkv = memory.wide.get(),
                      .class_rows = memory.class_rows.get<float>(),
                      .residual = model_.types.residual,
                      .compute = model_.types.compute},
                     state.batch, call, main_);
  cuda::merge_tokens(call, main_);
  mark("merge", double(state.batch) * double(model_.config.embed_dim) *
                    ((merge.kept + call.merged) * double(cuda::size_of(model_.types.residual)) +
                     merge.kept * model_.types.row_bytes()));
  state.now = next;
  state.tokens = merge.kept;
  state.merged = true;
  state.planned = {};
}

void Forward::mlp(State& state, const DeviceBlock& block) {
  void *rows = state.memory.rows.get(), *wide = state.memory.wide.get();
  block_linear("fc1", block.fc1, rows_to_rows(rows, state.rows(), wide, /*onto_stream=*/false), /*gelu=*/true);
  block_linear("fc2", block.fc2, rows_to_rows(wide, state.rows(), state.x(), /*onto_stream=*/true));
}

void Forward::block(State& state, const DeviceBlock& block, int index) {
  void *rows = state.memory.rows.get(), *wide = state.memory.wide.get();
  if (!state.normed) norm(state, block.norm1, rows);
  state.normed = false;
  block_linear("qkv", block.qkv, rows_to_rows(rows, state.rows(), wide, /*onto_stream=*/false));
  if (block.merge && block.merge->kind == DeviceMerge::Kind::bipartite) {
    attend_and_match(state, block, index);
  } else {
    const HostPlanner* planner = planners_[size_t(index)].get();
    const bool ranked = block.merge && block.merge->kind == DeviceMerge::Kind::rank;
    attend(state, attention(state, /*class_rows=*/planner ? planner->needs().class_attention : ranked));
    block_linear("proj", block.proj, projection(state));
    if (ranked) rank(state, *block.merge);
  }
  if (block.merge) {
    merge(state, block, index);
  } else {
    norm(state, block.norm2, rows);
  }
  mlp(state, block);
}

/// Logits of normalised rows, added to those of another head if `add`.
void Forward::classify(const cuda::LayerNormCall& features, const DeviceLinear& head, void* logits, bool add) {
  const cuda::LinearCall call = layer_call(head, {.x = features.y,
                                                  .residual = add ? logits : nullptr,
                                                  .y = logits,
                                                  .rows = features.rows,
                                                  .compute = DType::fp32,
                                                  .result = DType::fp32});
  if (cuda::norm_linear(features, call, main_)) return;
  cuda::layer_norm(features, main_);
  runner_.run(call, main_);
}

void Forward::head(State& state) {
  const nn::VitConfig& config = model_.config;
  const int channels = int(config.embed_dim);
  const Activations& memory = state.memory;
  const auto size = int64_t(cuda::size_of(model_.types.residual));
  for (size_t i = 0; i < model_.heads.size(); ++i) {
    cuda::LayerNormCall call{.x = static_cast<const char*>(state.x()) + int64_t(i) * channels * size,
                             .row_stride = int64_t(state.tokens) * channels,
                             .rows = state.batch,
                             .channels = channels,
                             .weight = model_.norm.weight,
                             .bias = model_.norm.bias,
                             .eps = float(config.norm_eps),
                             .y = memory.features.get(),
                             .residual = model_.types.residual,
                             .compute = DType::fp32};
    if (config.pool == nn::Pool::avg) {
      cuda::mean_of_tokens(state.x(), model_.types.residual, state.batch, state.tokens, int(config.protected_tokens()),
                           channels, memory.pooled.get<float>(), main_);
      call.x = memory.pooled.get();
      call.row_stride = channels;
      call.residual = DType::fp32;
    }
    classify(call, model_.heads[i], memory.logits.get(), i > 0);
    mark("head", double(channels) * double(config.num_classes) * 4,
         2.0 * state.batch * channels * double(config.num_classes));
  }
}

bool Forward::minds_company(int batch) const {
  // Measured on an H200 (ViT-B, PYRA): matching in line gains 1 to 4 % up to 16 images, nothing from 32 on. In company
  // it costs 1 to 8 %, for kernels that wait keep their multiprocessors.
  constexpr int kMostInLine = 24;
  return batch <= kMostInLine && std::ranges::any_of(model_.blocks, [](const DeviceBlock& block) {
           return block.merge && block.merge->kind == DeviceMerge::Kind::bipartite;
         });
}

void Forward::enqueue(int batch, const Activations& activations, bool beside) {
  State state{.batch = batch, .memory = activations, .one_stream = !beside && minds_company(batch)};
  enqueue(state);
}

void Forward::enqueue_timed(int batch, const Activations& activations, StageTimer& timer) {
  State state{.batch = batch, .memory = activations, .one_stream = false};
  timer_ = &timer;
  timer.begin(main_);
  enqueue(state);
  timer_ = nullptr;
}

void Forward::enqueue(State& state) {
  const int room = state.memory.batch;
  if (state.batch < 1 || state.batch > room)
    fail(ExitCode::internal, "forward: batch ", state.batch, ", planned for up to ", room);
  for (const auto& planner : planners_)
    if (planner) planner->reserve(room);
  embed(state);
  for (size_t i = 0; i < model_.blocks.size(); ++i) block(state, model_.blocks[i], int(i));
  head(state);
}

}  // namespace pyra::engine
