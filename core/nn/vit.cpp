#include "nn/vit.h"

#include "base/error.h"
#include "nn/vit_parts.h"
#include "sdk/linear_site.h"

namespace pyra::nn {
namespace {

std::string shape_text(at::IntArrayRef shape) {
  return cat("[", join(std::span<const int64_t>(shape.data(), shape.size())), "]");
}

void check_tensor(const std::string& name, const at::Tensor& tensor, at::IntArrayRef expected, ExitCode code) {
  if (tensor.sizes() != expected)
    fail(code, "tensor ", name, " is ", shape_text(tensor.sizes()), ", expected ", shape_text(expected));
  if (tensor.scalar_type() != at::kFloat) fail(code, "tensor ", name, " is ", tensor.scalar_type(), ", expected Float");
}

/// `learned` holds exactly what the plugin declares.
void check_learned(const std::string& plugin, const std::vector<sdk::TensorDecl>& declared, const TensorMap& learned,
                   const std::string& hint) {
  for (const sdk::TensorDecl& decl : declared) {
    const auto found = learned.find(decl.name);
    if (found == learned.end()) fail(ExitCode::usage, plugin, ": tensor ", decl.name, " is missing", hint);
    if (found->second.sizes() != at::IntArrayRef(decl.shape))
      fail(ExitCode::usage, plugin, ": tensor ", decl.name, " is ", shape_text(found->second.sizes()), ", needed is ",
           shape_text(decl.shape), hint);
  }
  if (learned.size() == declared.size()) return;
  for (const auto& [name, tensor] : learned) {
    const bool known =
        std::any_of(declared.begin(), declared.end(), [&](const auto& decl) { return decl.name == name; });
    if (!known) fail(ExitCode::usage, plugin, ": tensor ", name, " is not one of its own", hint);
  }
}

}  // namespace

std::vector<sdk::LinearSite> linear_sites(const VitConfig& config) {
  using sdk::LinearKind;
  std::vector<sdk::LinearSite> sites;
  sites.reserve(size_t(4 * config.depth));
  for (int64_t i = 0; i < config.depth; ++i)
    for (const LinearKind kind : {LinearKind::qkv, LinearKind::proj, LinearKind::fc1, LinearKind::fc2})
      sites.push_back(sdk::linear_site(config.shape(), i, kind));
  return sites;
}

Vit::Vit(VitConfig config, TensorMap weights) : config_(std::move(config)), weights_(std::move(weights)) {
  check_config(config_, "model");
  const std::vector<TensorShape> expected = tensor_shapes(config_);
  for (const TensorShape& tensor : expected) {
    const auto found = weights_.find(tensor.name);
    if (found == weights_.end()) fail(ExitCode::input, "tensor ", tensor.name, " is missing from the model");
    check_tensor(tensor.name, found->second, tensor.shape, ExitCode::input);
  }
  if (weights_.size() != expected.size())
    for (const auto& [name, tensor] : weights_)
      if (std::none_of(expected.begin(), expected.end(), [&](const auto& known) { return known.name == name; }))
        fail(ExitCode::input, "tensor ", name, " ", shape_text(tensor.sizes()), " is not one of this architecture's");
  rebuild();
}

Vit::~Vit() = default;
Vit::Vit(Vit&&) noexcept = default;
Vit& Vit::operator=(Vit&&) noexcept = default;

void Vit::rebuild() {
  const auto weight = [&](const std::string& name) -> const at::Tensor& { return weights_.find(name)->second; };
  const auto norm = [&](const std::string& name) { return Norm{weight(name + ".weight"), weight(name + ".bias")}; };
  const auto layer = [&](const std::string& name) {
    return kernels::LinearWeights(weight(name + ".weight"), weight(name + ".bias"));
  };
  Embedding embedding = embedding_of(config_, weights_);
  parts_ = std::make_unique<Parts>(Parts{
      .patch_embed = kernels::LinearWeights(weight("patch_embed.proj.weight").reshape({config_.embed_dim, -1}),
                                            weight("patch_embed.proj.bias")),
      .prefix = std::move(embedding.prefix),
      .patch_positions = std::move(embedding.positions),
      .blocks = {},
      .norm = norm(config_.pool == Pool::avg ? "fc_norm" : "norm"),
      .heads = {},
  });
  for (int64_t i = 0; i < config_.depth; ++i) {
    const std::string block = cat("blocks.", i, ".");
    parts_->blocks.push_back({.norm1 = norm(block + "norm1"),
                              .norm2 = norm(block + "norm2"),
                              .layers = {layer(block + "attn.qkv"), layer(block + "attn.proj"),
                                         layer(block + "mlp.fc1"), layer(block + "mlp.fc2")}});
  }
  if (config_.num_classes == 0) return;
  parts_->heads.push_back(layer("head"));
  if (config_.distilled) parts_->heads.push_back(layer("head_dist"));
}

void Vit::set_merge(std::unique_ptr<MergeSetup> merge) {
  if (merge) {
    const sdk::ModelShape shape = config_.shape();
    const std::string hint = cat(" (its tensors belong to one schedule and resolution; asked for is '",
                                 merge->schedule.text, "' at ", shape.tokens, " tokens: train it for that one)");
    check_learned("merger '" + merge->name + "'", merge->merger->declare(shape, merge->schedule), merge->learned, hint);
    tokens_after_ = merge->merger->tokens_after(merge->schedule, shape);
    if (int64_t(tokens_after_.size()) != config_.depth)
      fail(ExitCode::plugin, "merger '", merge->name, "': tokens_after gives ", tokens_after_.size(),
           " counts for a model of ", config_.depth, " blocks");
    int64_t tokens = shape.tokens;
    for (size_t i = 0; i < tokens_after_.size(); ++i) {
      if (tokens_after_[i] > tokens || tokens_after_[i] < shape.protected_tokens)
        fail(ExitCode::plugin, "merger '", merge->name, "', block ", i, ": ", tokens_after_[i], " tokens of ", tokens,
             " are to stay; expected ", shape.protected_tokens, " to ", tokens);
      tokens = tokens_after_[i];
    }
  } else {
    tokens_after_.clear();
  }
  merge_ = std::move(merge);
}

void Vit::set_peft(std::unique_ptr<PeftSetup> peft) {
  if (peft)
    check_learned("PEFT method '" + peft->name + "'", peft->method->declare(config_.shape()), peft->learned, "");
  peft_ = std::move(peft);
}

TensorMap Vit::train_mode() {
  TensorMap trained;
  for (auto& [name, tensor] : weights_) {
    const bool head = name.starts_with("head.") || name.starts_with("head_dist.");
    tensor.set_requires_grad(head || (peft_ && peft_->method->trains(name)));
    if (tensor.requires_grad()) trained.emplace(name, tensor);
  }
  if (peft_)
    for (auto& [name, tensor] : peft_->learned) trained.emplace(cat("peft.", peft_->name, ".", name), tensor);
  if (merge_)
    for (auto& [name, tensor] : merge_->learned) trained.emplace(cat("merge.", merge_->name, ".", name), tensor);
  for (auto& [name, tensor] : trained) tensor.set_requires_grad(true);
  // The parts hold views of the weights (patch embedding, positions): made anew, so that gradients reach the leaves.
  rebuild();
  return trained;
}

void Vit::eval_mode() {
  for (auto& [name, tensor] : weights_) tensor.set_requires_grad(false);
  if (peft_)
    for (auto& [name, tensor] : peft_->learned) tensor.set_requires_grad(false);
  if (merge_)
    for (auto& [name, tensor] : merge_->learned) tensor.set_requires_grad(false);
  rebuild();
}

void Vit::weights_changed() {
  parts_->for_each_layer([](kernels::LinearWeights& layer) {
    const bool bias_trains = layer.bias().defined() && layer.bias().requires_grad();
    if (layer.weight().requires_grad() || bias_trains) layer.invalidate();
  });
  const bool tokens_train = parts_->prefix.requires_grad() || parts_->patch_positions.requires_grad();
  if (tokens_train) rebuild();
}

TensorMap merged_weights(const Vit& model) {
  TensorMap weights = model.weights();
  const PeftSetup* peft = model.peft();
  if (!peft) return weights;
  if (!peft->method->mergeable())
    fail(ExitCode::usage, "PEFT method '", peft->name,
         "' cannot be merged: what it does is not a change of the frozen weights");
  for (const sdk::LinearSite& site : linear_sites(model.config())) {
    const sdk::LinearDelta delta = peft->method->delta(site, peft->learned);
    const auto add = [&](const std::string& name, const at::Tensor& change) {
      if (!change.defined()) return;
      at::Tensor& weight = weights.find(name)->second;
      if (change.sizes() != weight.sizes())
        fail(ExitCode::plugin, "PEFT method '", peft->name, "': the change of ", name, " is ",
             shape_text(change.sizes()), ", expected ", shape_text(weight.sizes()));
      weight = weight.detach() + change.detach().to(at::kFloat);
    };
    add(site.name() + ".weight", delta.weight);
    add(site.name() + ".bias", delta.bias);
  }
  return weights;
}

}  // namespace pyra::nn
