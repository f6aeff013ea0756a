#include "engine/cuda/device_model.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "base/error.h"

namespace pyra::engine {
namespace {

at::ScalarType scalar_type(DType dtype) {
  return dtype == DType::fp32 ? at::kFloat : dtype == DType::bf16 ? at::kBFloat16 : at::kHalf;
}

void check_shapes(const nn::VitConfig& config) {
  const int64_t head_dim = config.embed_dim / config.num_heads;
  if (head_dim % 16 != 0 || head_dim > 128)
    fail(ExitCode::usage, config.arch, ": a head has ", head_dim,
         " channels; the GPU's attention does multiples of 16 up to 128; use --device cpu");
  if (config.embed_dim > 4096 || config.tokens() > 1024)
    fail(ExitCode::usage, config.arch, ": ", config.embed_dim, " channels and ", config.tokens(),
         " tokens; the GPU's kernels do up to 4096 and 1024; use --device cpu");
  if (config.num_classes == 0) fail(ExitCode::usage, "the model has no head: fine-tune it first");
}

}  // namespace

DeviceTypes types_of(Precision precision) {
  switch (precision) {
    case Precision::bf16:
      return {DType::bf16, DType::fp32};
    case Precision::fp16:
      return {DType::fp16, DType::fp32};
    case Precision::tf32:
      return {DType::fp32, DType::fp32, true};
    default:
      return {};
  }
}

const void* DeviceModel::upload_any(const at::Tensor& tensor, DType dtype) {
  const at::Tensor host = tensor.detach().to(scalar_type(dtype)).contiguous();
  DeviceMemory memory(host.nbytes());
  PYRA_CUDA(cudaMemcpy(memory.get(), host.const_data_ptr(), host.nbytes(), cudaMemcpyHostToDevice));
  bytes += memory.bytes();
  memory_.push_back(std::move(memory));
  return memory_.back().get();
}

template <class T>
const T* DeviceModel::upload(const at::Tensor& tensor, DType dtype) {
  return static_cast<const T*>(upload_any(tensor, dtype));
}

DeviceLinear DeviceModel::linear(const nn::TensorMap& weights, const std::string& name, DType result) {
  const at::Tensor weight = weights.at(name + ".weight").flatten(1);
  return {.weight = upload_any(weight, types.compute),
          .bias = upload_any(weights.at(name + ".bias"), result),
          .in = int(weight.size(1)),
          .out = int(weight.size(0))};
}

DeviceNorm DeviceModel::norm_of(const nn::TensorMap& weights, const std::string& name) {
  return {.weight = upload(weights.at(name + ".weight")), .bias = upload(weights.at(name + ".bias"))};
}

void DeviceModel::add_heads(const nn::TensorMap& weights) {
  norm = norm_of(weights, config.pool == nn::Pool::avg ? "fc_norm" : "norm");
  const std::vector<std::string> names =
      config.distilled ? std::vector<std::string>{"head", "head_dist"} : std::vector<std::string>{"head"};
  const double share = 1.0 / double(names.size());
  for (const std::string& name : names)
    heads.push_back({.weight = upload(weights.at(name + ".weight") * share),
                     .bias = upload(weights.at(name + ".bias") * share),
                     .in = int(config.embed_dim),
                     .out = int(config.num_classes)});
}

DeviceMerge DeviceModel::merge_of(const nn::MergeSetup& setup, int block, int tokens, int kept) {
  DeviceMerge merge{.kept = kept};
  const auto recipe = setup.merger->recipe(block, setup.schedule, setup.learned);
  if (!recipe) {
    merge.kind = DeviceMerge::Kind::by_host;
    merge.merged = tokens;  // how many it merges is known when it has planned; room for all
    return merge;
  }
  if (recipe->kind == sdk::PlanKind::rank) {
    merge.kind = DeviceMerge::Kind::rank;
    merge.prune = int(recipe->prune);
    merge.merged = int(recipe->prune - recipe->merge);
    merge.weighted = false;
    return merge;
  }
  merge.merged = int(recipe->remove);
  const std::vector<int64_t> side = sdk::side_a(recipe->partition, tokens, config.protected_tokens());
  if (!side.empty()) {
    at::Tensor flags = at::zeros({tokens}, at::kByte);
    for (const int64_t token : side) flags[token] = 1;
    DeviceMemory memory(flags.nbytes());
    PYRA_CUDA(cudaMemcpy(memory.get(), flags.const_data_ptr(), flags.nbytes(), cudaMemcpyHostToDevice));
    merge.in_side_a = memory.get<uint8_t>();
    memory_.push_back(std::move(memory));
  }
  if (recipe->gate) {
    merge.gate_a = upload(recipe->gate->a);
    merge.gate_b = upload(recipe->gate->b);
    merge.gate_weight = upload(recipe->gate->weight);
    merge.gate_bias = upload(recipe->gate->bias);
    merge.gate_eps = float(recipe->gate->eps);
  }
  return merge;
}

DeviceModel::DeviceModel(const nn::Vit& model, DeviceTypes types_of_activations)
    : types(types_of_activations), config(model.config()) {
  check_shapes(config);
  const nn::TensorMap weights = model.peft() ? nn::merged_weights(model) : model.weights();
  const int64_t first = config.protected_tokens();
  at::Tensor tokens = weights.at("cls_token");
  if (config.distilled) tokens = at::cat({tokens, weights.at("dist_token")}, 1);
  const at::Tensor& position = weights.at("pos_embed");
  prefix = upload(tokens + position.narrow(1, 0, first));
  positions = upload(position.narrow(1, first, config.patches()));
  patch_embed = linear(weights, "patch_embed.proj", types.compute);

  const nn::MergeSetup* setup = model.merge();
  proportional_attention = !setup || setup->proportional_attention;
  int count = int(config.tokens());
  for (int i = 0; i < int(config.depth); ++i) {
    const std::string name = cat("blocks.", i, ".");
    DeviceBlock block{.norm1 = norm_of(weights, name + "norm1"),
                      .norm2 = norm_of(weights, name + "norm2"),
                      .qkv = linear(weights, name + "attn.qkv", types.compute),
                      .proj = linear(weights, name + "attn.proj", types.residual),
                      .fc1 = linear(weights, name + "mlp.fc1", types.compute),
                      .fc2 = linear(weights, name + "mlp.fc2", types.residual),
                      .tokens = count,
                      .merge = std::nullopt};
    const int kept = setup ? int(model.tokens_after()[size_t(i)]) : count;
    if (setup && setup->merger->acts(count, kept)) block.merge = merge_of(*setup, i, count, kept);
    count = kept;
    blocks.push_back(std::move(block));
  }
  add_heads(weights);
}

}  // namespace pyra::engine
