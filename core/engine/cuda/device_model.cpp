#include "engine/cuda/device_model.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "base/error.h"

namespace pyra::engine {
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

DeviceLinear DeviceModel::linear(const nn::TensorMap& weights, const std::string& name, DType result) {
  const at::Tensor weight = weights.at(name + ".weight").flatten(1);
  return {.weight = store_.upload(weight, types.compute),
          .bias = store_.upload(weights.at(name + ".bias"), result),
          .in = int(weight.size(1)),
          .out = int(weight.size(0))};
}

DeviceNorm DeviceModel::norm_of(const nn::TensorMap& weights, const std::string& name) {
  return {.weight = store_.upload(weights.at(name + ".weight")), .bias = store_.upload(weights.at(name + ".bias"))};
}

void DeviceModel::add_heads(const nn::TensorMap& weights) {
  norm = norm_of(weights, config.pool == nn::Pool::avg ? "fc_norm" : "norm");
  const std::vector<std::string> names =
      config.distilled ? std::vector<std::string>{"head", "head_dist"} : std::vector<std::string>{"head"};
  const double share = 1.0 / double(names.size());
  for (const std::string& name : names)
    heads.push_back({.weight = store_.upload(weights.at(name + ".weight") * share),
                     .bias = store_.upload(weights.at(name + ".bias") * share),
                     .in = int(config.embed_dim),
                     .out = int(config.num_classes)});
}

std::optional<sdk::PlanRecipe> checked_recipe(const nn::MergeSetup& setup, int block, int tokens, int kept,
                                              const nn::VitConfig& config) {
  auto recipe = setup.merger->recipe(block, setup.schedule, setup.learned);
  if (!recipe) return recipe;
  const auto refuse = [&](const auto&... what) {
    fail(ExitCode::plugin, "merger '", setup.name, "', block ", block, ": recipe() ", what...);
  };
  const bool ranks = recipe->kind == sdk::PlanKind::rank;
  if (!ranks && recipe->kind != sdk::PlanKind::bipartite) refuse("is of an unknown kind, ", int(recipe->kind));
  const bool fits = ranks ? recipe->merge == kept && recipe->prune >= kept && recipe->prune <= tokens
                          : recipe->remove == tokens - kept && recipe->remove >= 0;
  if (!fits)
    refuse("does not leave ", kept, " of ", tokens, " tokens, as tokens_after() says: remove ", recipe->remove,
           ", prune ", recipe->prune, ", merge ", recipe->merge);
  if (!recipe->gate) return recipe;
  const auto check = [&](const char* name, const at::Tensor& tensor, int64_t count) {
    if (!tensor.defined() || tensor.scalar_type() != at::kFloat || tensor.numel() != count)
      refuse("has a gate whose ", name, " is no fp32 tensor of ", count, " numbers");
  };
  check("a", recipe->gate->a, recipe->remove);
  check("b", recipe->gate->b, config.embed_dim);
  check("weight", recipe->gate->weight, config.embed_dim);
  check("bias", recipe->gate->bias, config.embed_dim);
  return recipe;
}

DeviceMerge merge_of(const sdk::PlanRecipe& recipe, int tokens, int kept, int64_t protected_tokens,
                     DeviceStore& store) {
  DeviceMerge merge{.kept = kept};
  if (recipe.kind == sdk::PlanKind::rank) {
    merge.kind = DeviceMerge::Kind::rank;
    merge.prune = int(recipe.prune);
    merge.merged = int(recipe.prune - recipe.merge);
    merge.weighted = false;
    return merge;
  }
  merge.merged = int(recipe.remove);
  merge.in_side_a = store.upload_side_a(recipe.partition, tokens, protected_tokens);
  return merge;
}

DeviceMerge DeviceModel::planned_merge(const nn::MergeSetup& setup, int block, int tokens, int kept) {
  const auto recipe = checked_recipe(setup, block, tokens, kept, config);
  if (!recipe) {  // how many it merges is known when it has planned; room for all
    return {.kind = DeviceMerge::Kind::by_host, .kept = kept, .merged = tokens};
  }
  DeviceMerge merge = merge_of(*recipe, tokens, kept, config.protected_tokens(), store_);
  if (!recipe->gate) return merge;
  merge.gate_a = store_.upload(recipe->gate->a);
  merge.gate_b = store_.upload(recipe->gate->b);
  merge.gate_weight = store_.upload(recipe->gate->weight);
  merge.gate_bias = store_.upload(recipe->gate->bias);
  merge.gate_eps = float(recipe->gate->eps);
  return merge;
}

DeviceModel::DeviceModel(const nn::Vit& model, DeviceTypes types_of_activations)
    : types(types_of_activations), config(model.config()) {
  check_shapes(config);
  const nn::TensorMap weights = model.peft() ? nn::merged_weights(model) : model.weights();
  const nn::Embedding embedding = nn::embedding_of(config, weights);
  prefix = store_.upload(embedding.prefix);
  positions = store_.upload(embedding.positions);
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
    if (setup && setup->merger->acts(count, kept)) block.merge = planned_merge(*setup, i, count, kept);
    count = kept;
    blocks.push_back(std::move(block));
  }
  add_heads(weights);
}

}  // namespace pyra::engine
