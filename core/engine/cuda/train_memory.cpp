#include <algorithm>

#include "engine/cuda/train_step.h"

namespace pyra::engine {

namespace cuda = kernels::cuda;

namespace {

/// The stream's gradient goes from one of two buffers to the other wherever the number of tokens changes: how many each
/// of them holds at most. The way back begins in the first.
std::array<int, 2> gradient_tokens(const TrainModel& model) {
  std::array<int, 2> most{};
  size_t now = 0;
  most[0] = model.blocks.back().tokens_after();
  for (auto block = model.blocks.rbegin(); block != model.blocks.rend(); ++block) {
    if (block->merge || block->class_alone) now = 1 - now;
    most[now] = std::max(most[now], block->tokens);
  }
  return most;
}

}  // namespace

/// Calls allocate(memory, bytes) for all that a step of `images` images needs.
template <class Allocate>
void TrainMemory::plan(const TrainModel& model, int images, const Allocate& allocate) {
  const nn::VitConfig& config = model.config;
  const size_t b = size_t(images), c = size_t(config.embed_dim), compute = cuda::size_of(model.types.compute);
  const size_t n = size_t(config.tokens()), patch_values = size_t(3 * config.patch_size * config.patch_size);
  const size_t heads = size_t(config.num_heads);
  size_t widest = std::max(n * 3 * c * compute, size_t(config.patches()) * std::max(patch_values * compute, c * 4));
  size_t longest = c, spare_row = 0;
  stream.resize(1);
  sizes.clear();
  blocks.resize(model.blocks.size());
  allocate(stream[0], b * n * c * 4);
  for (size_t i = 0; i < model.blocks.size(); ++i) {
    const TrainBlock& block = model.blocks[i];
    SavedBlock& saved = blocks[i];
    const size_t before = b * size_t(block.tokens), after = b * size_t(block.tokens_after());
    allocate(saved.normalised1, before * c * compute);
    allocate(saved.inverse1, before * 4);
    allocate(saved.normalised2, after * c * compute);
    allocate(saved.inverse2, after * 4);
    allocate(saved.qkv, before * 3 * c * compute);
    allocate(saved.attended, before * c * compute);
    allocate(saved.log_sum, before * heads * 4);
    // The gradient of q, k and v comes here too where it fits (train_backward.cpp); with the class tokens alone it is
    // the larger.
    const size_t hidden = after * size_t(block.fc2.stride),
                 qkv = block.class_alone && block.qkv.lora ? before * 3 * c : 0;
    allocate(saved.hidden, std::max(hidden, qkv) * compute);
    const std::array<const TrainLinear*, 4> layers = {&block.qkv, &block.proj, &block.fc1, &block.fc2};
    for (size_t kind = 0; kind < layers.size(); ++kind) {
      if (!layers[kind]->lora) continue;
      const size_t rows = kind < 2 ? before : after;
      allocate(saved.low[kind], rows * size_t(layers[kind]->lora->padded) * compute);
    }
    longest = std::max({longest, size_t(block.qkv.stride), size_t(block.fc1.stride)});
    if (block.proj.lora) spare_row = std::max(spare_row, size_t(block.proj.stride));
    if (block.fc2.lora) spare_row = std::max(spare_row, size_t(block.fc2.stride));
    widest = std::max(widest, size_t(block.tokens_after()) * size_t(block.fc2.stride) * compute);
    if (block.merge || block.class_alone) allocate(stream.emplace_back(), after * c * 4);
    if (!block.merge) continue;
    allocate(sizes.emplace_back(), after * 4);
    for (DeviceMemory* memory : {&saved.keep, &saved.src, &saved.dst, &saved.cosine}) allocate(*memory, before * 4);
  }
  const std::array<int, 2> most = gradient_tokens(model);
  for (size_t i = 0; i < d_stream.size(); ++i) allocate(d_stream[i], b * size_t(most[i]) * c * 4);
  allocate(rows, b * n * longest * compute);
  allocate(branch, b * n * c * compute);
  allocate(wide, b * widest);
  if (spare_row > 0) allocate(spare, b * n * spare_row * compute);
  allocate(class_rows, b * n * heads * 4);
  for (DeviceMemory* memory : {&pooled, &features_normalised, &features, &d_features}) allocate(*memory, b * c * 4);
  allocate(features_inverse, b * 4);
  for (DeviceMemory* memory : {&logits, &d_logits}) allocate(*memory, b * size_t(config.num_classes) * 4);
}

TrainMemory::TrainMemory(const TrainModel& model, int images) : batch(images) {
  plan(model, images, [this](DeviceMemory& memory, size_t wanted) {
    memory = DeviceMemory(wanted);
    bytes += wanted;
    // Columns behind a row are read before anyone wrote them, and 0 times NaN would be NaN.
    if (wanted > 0) PYRA_CUDA(cudaMemset(memory.get(), 0, wanted));
  });
}

size_t TrainMemory::bytes_for(const TrainModel& model, int batch) {
  TrainMemory unused;
  size_t total = 0;
  unused.plan(model, batch, [&](DeviceMemory&, size_t wanted) { total += wanted; });
  return total;
}

}  // namespace pyra::engine
