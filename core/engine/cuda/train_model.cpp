#include "engine/cuda/train_model.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <climits>

#include "base/error.h"
#include "kernels/linear_path.h"
#include "nn/vit_parts.h"

namespace pyra::engine {

namespace cuda = kernels::cuda;

namespace {

constexpr int kColumnStep = 16;    // columns behind a layer: a multiple keeps rows aligned for the matrix products
constexpr int64_t kArenaStep = 4;  // floats: tensors of the arena begin at 16 bytes

[[noreturn]] void only_cpu(const std::string& what, const std::string& why) {
  fail(ExitCode::usage, what, ": ", why, "; train on the CPU: --device cpu");
}

}  // namespace

/// Masters, moments and gradients: a float each for every element, one tensor behind the other.
void TrainModel::add_arena() {
  for (const TrainedTensor& tensor : tensors_) {
    segments.push_back({.offset = arena_floats_, .count = tensor.value.numel(), .merge_group = tensor.merge_group});
    arena_floats_ += (tensor.value.numel() + kArenaStep - 1) / kArenaStep * kArenaStep;
  }
  for (DeviceMemory& memory : arena_) {
    memory = DeviceMemory(size_t(arena_floats_) * sizeof(float));
    PYRA_CUDA(cudaMemset(memory.get(), 0, memory.bytes()));
  }
  claimed_.assign(tensors_.size(), false);
}

/// The trained tensor that `tensor` is, which then trains at this position.
TrainedSlot TrainModel::slot_of(const at::Tensor& tensor, int position) {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const at::Tensor& value = tensors_[i].value;
    if (value.const_data_ptr() != tensor.const_data_ptr() || value.numel() != tensor.numel()) continue;
    claimed_[i] = true;
    first_position = std::min(first_position, position);
    return {int(i)};
  }
  return {};
}

const float* TrainModel::master(TrainedSlot slot) const {
  return values() + segments[size_t(slot.tensor)].offset;
}

const float* TrainModel::master_or_upload(const at::Tensor& tensor, TrainedSlot slot) {
  return slot ? master(slot) : store_.upload(tensor);
}

TrainNorm TrainModel::norm_of(const nn::TensorMap& weights, const std::string& name, int position) {
  const at::Tensor &weight = weights.at(name + ".weight"), &bias = weights.at(name + ".bias");
  TrainNorm norm{.weight_slot = slot_of(weight, position), .bias_slot = slot_of(bias, position)};
  norm.weight = master_or_upload(weight, norm.weight_slot);
  norm.bias = master_or_upload(bias, norm.bias_slot);
  return norm;
}

TrainLinear TrainModel::linear(const nn::Vit& model, const std::string& name, int position) {
  const at::Tensor weight = model.weights().at(name + ".weight").flatten(1), &bias = model.weights().at(name + ".bias");
  TrainLinear layer{.in = int(weight.size(1)), .out = int(weight.size(0)), .stride = int(weight.size(1))};
  layer.bias_slot = slot_of(bias, position);
  void* copy = store_.upload(bias, types.compute);
  layer.bias = copy;
  if (!layer.bias_slot) return layer;
  cuda::Segment& own = segment(layer.bias_slot);
  own.copy = copy;
  own.copy_dtype = types.compute;
  own.columns = layer.out;
  own.copy_stride = layer.out;
  own.copy_scale = 1;
  return layer;
}

/// A method may adapt some of q, k and v alone and then gives B with the other rows zero and cut off. Which rows are
/// left, and of which tensor, its gradient says.
void TrainModel::find_b(LoraTerm& term, const at::Tensor& b, int position) {
  const int out = int(b.size(0));
  term.b_slot = slot_of(b, position);
  if (term.b_slot) {
    term.b_rows = {{0, out}};
    return;
  }
  std::vector<at::Tensor> inputs;
  for (const TrainedTensor& tensor : tensors_) inputs.push_back(tensor.value);
  const auto gradients = b.requires_grad()
                             ? torch::autograd::grad({b.sum()}, inputs, {}, std::nullopt, false, /*allow_unused=*/true)
                             : torch::autograd::variable_list(inputs.size());
  for (size_t i = 0; i < gradients.size(); ++i) {
    const at::Tensor& gradient = gradients[i];
    if (!gradient.defined()) continue;
    const at::Tensor rows = gradient.select(1, 0);
    const bool masks = inputs[i].sizes() == b.sizes() && at::equal(gradient, rows.unsqueeze(1).expand_as(gradient)) &&
                       at::equal(rows * rows, rows) && at::equal(inputs[i].detach() * gradient, b.detach());
    if (!masks || term.b_slot) only_cpu(cat("PEFT method '", peft_->name, "'"), "its B is computed from its tensors");
    term.b_slot = slot_of(inputs[i], position);
    for (int row = 0; row < out; ++row) {
      if (rows[row].item<float>() == 0) continue;
      if (term.b_rows.empty() || term.b_rows.back().second != row) term.b_rows.emplace_back(row, row);
      term.b_rows.back().second = row + 1;
    }
  }
  if (!term.b_slot) only_cpu(cat("PEFT method '", peft_->name, "'"), "its B is none of its trained tensors");
}

LoraTerm TrainModel::lora_of(const sdk::LinearSite& site, const sdk::LowRank& low_rank, int position) {
  LoraTerm term{.rank = int(low_rank.a.size(0)), .scale = float(low_rank.scale)};
  term.padded = cuda::round_up(term.rank, kColumnStep);
  if (term.rank > cuda::kMaxLoraRank)
    only_cpu(cat("PEFT method '", peft_->name, "'"),
             cat("rank ", term.rank, ", a GPU's kernels do up to ", cuda::kMaxLoraRank));
  term.a_slot = slot_of(low_rank.a, position);
  if (!term.a_slot) only_cpu(cat("PEFT method '", peft_->name, "'"), "its A is none of its trained tensors");
  term.a = master(term.a_slot);
  find_b(term, low_rank.b, position);
  if (low_rank.dropout > 0) {
    const kernels::Dropout dropout{.p = low_rank.dropout};
    term.dropout = {.threshold = kernels::dropout_threshold(dropout),
                    .scale = kernels::dropout_scale(dropout),
                    .seed = options_.seed,
                    .step = step_,
                    .sites_per_step = nn::kSitesPerStep,
                    .site = nn::dropout_site(site.block, site.kind)};
  }
  return term;
}

TrainLinear TrainModel::block_linear(const nn::Vit& model, int block, sdk::LinearKind kind, Place place) {
  const int position = position_of(block, place);
  sdk::LinearSite site{.block = block, .kind = kind, .in = 0, .out = 0};
  TrainLinear layer = linear(model, site.name(), position);
  site.in = layer.in;
  site.out = layer.out;
  if (peft_ && peft_->method->adapts(site))
    only_cpu(cat("PEFT method '", peft_->name, "'"), cat("it changes ", site.name(), " by autograd operations"));
  if (peft_) {
    const at::AutoGradMode gradients(true);  // where its tensors go shows in the gradients
    if (const auto low_rank = peft_->method->low_rank(site, peft_->learned))
      layer.lora = lora_of(site, *low_rank, position);
  }
  if (layer.lora) layer.stride = layer.in + layer.lora->padded;
  const at::Tensor frozen = model.weights().at(site.name() + ".weight").detach();
  at::Tensor host = at::zeros({layer.out, layer.stride}, scalar_type(types.compute));
  host.narrow(1, 0, layer.in).copy_(frozen);
  layer.weight = store_.upload(host, types.compute);
  if (!layer.lora) return layer;
  cuda::Segment& b = segment(layer.lora->b_slot);
  b.copy = static_cast<char*>(layer.weight) + size_t(layer.in) * cuda::size_of(types.compute);
  b.copy_dtype = types.compute;
  b.columns = layer.lora->rank;
  b.copy_stride = layer.stride;
  b.copy_scale = layer.lora->scale;
  return layer;
}

void TrainModel::add_merge(const nn::MergeSetup& setup, TrainBlock& block, int index, int kept) {
  const auto recipe = checked_recipe(setup, index, block.tokens, kept, config);
  if (!recipe)
    only_cpu(cat("merger '", setup.name, "'"),
             "it has a plan() and no recipe, and a plan of the host's is not trained "
             "through on a GPU");
  DeviceMerge merge = merge_of(*recipe, block.tokens, kept, config.protected_tokens(), store_);
  if (recipe->gate) {
    const sdk::Gate& gate = *recipe->gate;
    const int position = position_of(index, Place::merge);
    block.gate_a = slot_of(gate.a, position);
    block.gate_b = slot_of(gate.b, position);
    block.gate_weight = slot_of(gate.weight, position);
    block.gate_bias = slot_of(gate.bias, position);
    merge.gate_a = master_or_upload(gate.a, block.gate_a);
    merge.gate_b = master_or_upload(gate.b, block.gate_b);
    merge.gate_weight = master_or_upload(gate.weight, block.gate_weight);
    merge.gate_bias = master_or_upload(gate.bias, block.gate_bias);
    merge.gate_eps = float(gate.eps);
  }
  block.merge = merge;
}

void TrainModel::add_block(const nn::Vit& model, int index, int tokens) {
  using sdk::LinearKind;
  const std::string name = cat("blocks.", index, ".");
  TrainBlock block{.norm1 = norm_of(model.weights(), name + "norm1", position_of(index, Place::norm1)),
                   .norm2 = norm_of(model.weights(), name + "norm2", position_of(index, Place::norm2)),
                   .qkv = block_linear(model, index, LinearKind::qkv, Place::qkv),
                   .proj = block_linear(model, index, LinearKind::proj, Place::proj),
                   .fc1 = block_linear(model, index, LinearKind::fc1, Place::fc1),
                   .fc2 = block_linear(model, index, LinearKind::fc2, Place::fc2),
                   .tokens = tokens,
                   .merge = std::nullopt};
  const nn::MergeSetup* setup = model.merge();
  const int kept = setup ? int(model.tokens_after()[size_t(index)]) : tokens;
  if (setup && setup->merger->acts(tokens, kept)) add_merge(*setup, block, index, kept);
  blocks.push_back(std::move(block));
}

void TrainModel::add_head(const nn::Vit& model) {
  if (config.distilled) only_cpu(config.arch, "two heads");
  const int position = position_of(int(config.depth), Place::norm1);
  norm = norm_of(model.weights(), config.pool == nn::Pool::avg ? "fc_norm" : "norm", position);
  const at::Tensor &weight = model.weights().at("head.weight"), &bias = model.weights().at("head.bias");
  head_weight_slot = slot_of(weight, position);
  head_bias_slot = slot_of(bias, position);
  head_weight = master_or_upload(weight, head_weight_slot);
  head_bias = master_or_upload(bias, head_bias_slot);
}

/// Where the head reads the class token alone, the last block's proj and MLP are computed for that row of each image
/// alone, forward and back. Its merge never touches that token, so there is none: gradients of its gate are zero. LoRA
/// terms of these layers would number their dropout's masks by other rows than the CPU does.
void TrainModel::keep_what_the_head_reads() {
  TrainBlock& last = blocks.back();
  last.class_alone = config.pool == nn::Pool::token && !last.proj.lora && !last.fc1.lora && !last.fc2.lora;
  if (last.class_alone) last.merge.reset();
}

void TrainModel::check_all_claimed() const {
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (!claimed_[i])
      only_cpu(cat("tensor '", tensors_[i].name, "'"),
               "a GPU trains LoRA's terms, biases, norms, PYRA's gates and the head");
}

TrainModel::TrainModel(const nn::Vit& model, const std::vector<TrainedTensor>& tensors, const TrainerOptions& options,
                       const uint64_t* step_on_device)
    : types(types_of(options.precision)),
      config(model.config()),
      first_position(INT_MAX),
      tensors_(tensors),
      options_(options),
      peft_(model.peft()),
      step_(step_on_device) {
  check_shapes(config);
  add_arena();
  const nn::TensorMap& weights = model.weights();
  if (config.distilled) only_cpu(config.arch, "two heads");
  const nn::Embedding embedding = nn::embedding_of(config, weights);
  prefix = store_.upload(embedding.prefix);
  positions = store_.upload(embedding.positions);
  patch_embed = linear(model, "patch_embed.proj", kEmbedPosition);
  patch_embed.weight = store_.upload(weights.at("patch_embed.proj.weight").flatten(1), types.compute);
  proportional_attention = !model.merge() || model.merge()->proportional_attention;
  int tokens = int(config.tokens());
  for (int i = 0; i < int(config.depth); ++i) {
    add_block(model, i, tokens);
    tokens = blocks.back().tokens_after();
  }
  keep_what_the_head_reads();
  add_head(model);
  check_all_claimed();
  take_over();
}

void TrainModel::copy_out(const TrainedTensor& tensor, const cuda::Segment& segment) const {
  if (!segment.copy) return;
  const at::Tensor host = (tensor.value.detach() * double(segment.copy_scale))
                              .to(scalar_type(segment.copy_dtype))
                              .reshape({-1, segment.columns})
                              .contiguous();
  const size_t size = cuda::size_of(segment.copy_dtype), row = size_t(segment.columns) * size;
  PYRA_CUDA(cudaMemcpy2D(segment.copy, size_t(segment.copy_stride) * size, host.const_data_ptr(), row, row,
                         size_t(host.size(0)), cudaMemcpyHostToDevice));
}

void TrainModel::take_over() {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const TrainedTensor& tensor = tensors_[i];
    const at::Tensor from[] = {tensor.value, tensor.first, tensor.second};
    for (size_t k = 0; k < std::size(from); ++k)
      PYRA_CUDA(cudaMemcpy(arena_[k].get<float>() + segments[i].offset, from[k].const_data_ptr(), from[k].nbytes(),
                           cudaMemcpyHostToDevice));
    copy_out(tensor, segments[i]);
  }
}

void TrainModel::publish() const {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const TrainedTensor& tensor = tensors_[i];
    const at::Tensor to[] = {tensor.value.detach(), tensor.first, tensor.second};
    for (size_t k = 0; k < std::size(to); ++k)
      PYRA_CUDA(cudaMemcpy(to[k].data_ptr(), arena_[k].get<float>() + segments[i].offset, to[k].nbytes(),
                           cudaMemcpyDeviceToHost));
  }
}

}  // namespace pyra::engine
