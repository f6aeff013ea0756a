// The forward pass: what every block does, in training and in inference.
#include "base/error.h"
#include "base/guard.h"
#include "base/philox.h"
#include "kernels/attention.h"
#include "kernels/layer_norm.h"
#include "kernels/merge.h"
#include "nn/soft_reduction.h"
#include "nn/vit_parts.h"

namespace pyra::nn {
namespace {

/// Stochastic depth: 0 or 1/(1-p) for each image. Undefined when nothing is dropped.
at::Tensor branch_scale(int64_t batch, double p, const StepRandom& random, int64_t block, int64_t branch) {
  if (p <= 0) return {};
  at::Tensor scale = at::empty({batch}, at::kFloat);
  fill_branch_scale(p, random, block, branch, scale.data_ptr<float>(), batch);
  return scale;
}

}  // namespace

// Out of line, so that one vtable and one typeinfo serve the whole program.
SoftReduction::~SoftReduction() = default;

kernels::MergeArguments arguments_of(const sdk::MergePlan& plan) {
  kernels::MergeArguments arguments{.keep = plan.keep,
                                    .src = plan.src,
                                    .dst = plan.dst,
                                    .weighted = plan.reduce == sdk::Reduce::weighted_mean,
                                    .gate = std::nullopt,
                                    .src_weight = plan.src_weight,
                                    .src_size_scale = plan.src_size_scale};
  if (plan.gate)
    arguments.gate = kernels::MergeGate{.a = plan.gate->a,
                                        .b = plan.gate->b,
                                        .weight = plan.gate->weight,
                                        .bias = plan.gate->bias,
                                        .eps = plan.gate->eps};
  return arguments;
}

void fill_branch_scale(double p, const StepRandom& random, int64_t block, int64_t branch, float* scale, int64_t batch) {
  const Philox generator(random.seed, RandomStream::drop_path,
                         random.step * kSitesPerStep + uint64_t(2 * block + branch));
  for (int64_t i = 0; i < batch; ++i)
    scale[i] = generator.uniform(uint64_t(i)) < float(p) ? 0.0f : float(1.0 / (1.0 - p));
}

/// One forward pass: the residual stream and what the blocks need to know of it.
struct Vit::Pass {
  const Vit& model;
  const ForwardOptions& options;
  int64_t batch = 0;
  at::Tensor x;         ///< [B,N,C] fp32
  at::Tensor sizes;     ///< [B,N] fp32
  bool merged = false;  ///< sizes differ from one

  [[nodiscard]] const VitConfig& config() const { return model.config_; }
  [[nodiscard]] at::Tensor rows() const { return x.reshape({-1, config().embed_dim}); }

  void embed(const at::Tensor& images);
  void block(int64_t index);
  [[nodiscard]] kernels::AttentionOutput attend(int64_t index, const at::Tensor& qkv, const sdk::Needs& needs) const;
  void merge(int64_t index, const kernels::AttentionOutput& attention);
  [[nodiscard]] at::Tensor linear(const BlockParts& parts, int64_t index, sdk::LinearKind kind, const at::Tensor& input,
                                  kernels::LinearOptions linear_options) const;
  [[nodiscard]] at::Tensor patch_mean() const;
  [[nodiscard]] at::Tensor head() const;
};

void Vit::Pass::embed(const at::Tensor& images) {
  const int64_t patch = config().patch_size, side = config().image_size / patch;
  const at::Tensor patches = images.reshape({batch, 3, side, patch, side, patch})
                                 .permute({0, 2, 4, 1, 3, 5})
                                 .to(options.compute)
                                 .reshape({batch * side * side, 3 * patch * patch});
  const at::Tensor embedded = kernels::linear(patches, model.parts_->patch_embed).to(at::kFloat);
  const at::Tensor& prefix = model.parts_->prefix;
  x = at::cat({prefix.expand({batch, prefix.size(1), prefix.size(2)}),
               embedded.view({batch, side * side, -1}) + model.parts_->patch_positions},
              1);
  sizes = at::ones({batch, x.size(1)}, at::kFloat);
}

at::Tensor Vit::Pass::linear(const BlockParts& parts, int64_t index, sdk::LinearKind kind, const at::Tensor& input,
                             kernels::LinearOptions linear_options) const {
  const kernels::LinearWeights& layer = parts.layers[size_t(kind)];
  const PeftSetup* peft = model.peft_.get();
  if (!peft) return kernels::linear(input, layer, linear_options);

  const sdk::LinearSite site{.block = index, .kind = kind, .in = layer.weight().size(1), .out = layer.weight().size(0)};
  if (const auto low_rank = peft->method->low_rank(site, peft->learned)) {
    linear_options.low_rank = kernels::LowRankTerm{.a = low_rank->a, .b = low_rank->b, .scale = low_rank->scale};
    if (options.training && low_rank->dropout > 0)
      linear_options.low_rank->dropout = {.p = low_rank->dropout,
                                          .seed = options.random.seed,
                                          .domain = options.random.step * kSitesPerStep + dropout_site(index, kind)};
  }
  if (!peft->method->adapts(site)) return kernels::linear(input, layer, linear_options);

  // A method of its own kind sees the layer's bare output, so activation and residual wait until after it.
  kernels::LinearOptions bare{.low_rank = linear_options.low_rank};
  at::Tensor y = peft->method->adapt(site, input, kernels::linear(input, layer, bare), peft->learned);
  if (y.dim() != 2 || y.size(0) != input.size(0) || y.size(1) != site.out)
    fail(ExitCode::plugin, "PEFT method '", peft->name, "' at ", site.name(), " returned a tensor of another shape");
  if (linear_options.activation == kernels::Activation::gelu) y = at::gelu(y);
  if (!linear_options.residual.defined()) return y.to(options.compute);
  y = y.to(at::kFloat);
  if (linear_options.branch_scale.defined())
    y = (y.view({batch, -1, site.out}) * linear_options.branch_scale.view({batch, 1, 1})).view({-1, site.out});
  return linear_options.residual + y;
}

kernels::AttentionOutput Vit::Pass::attend(int64_t index, const at::Tensor& qkv, const sdk::Needs& needs) const {
  if (options.soft) return {.out = options.soft->attend(index, qkv), .key_mean = {}, .class_attention = {}};
  kernels::AttentionOptions attention_options{.key_mean = needs.key_mean, .class_attention = needs.class_attention};
  // log(1) adds nothing: before the first merge the bias is left out, not added as zeros.
  if (merged && model.merge_->proportional_attention) attention_options.sizes = sizes;
  return kernels::attention(qkv, config().num_heads, attention_options);
}

void Vit::Pass::merge(int64_t index, const kernels::AttentionOutput& attention) {
  const MergeSetup& setup = *model.merge_;
  const sdk::MergeInputs inputs{.block = index,
                                .protected_tokens = config().protected_tokens(),
                                .tokens = x.detach(),
                                .sizes = sizes,
                                .key_mean = attention.key_mean,
                                .class_attention = attention.class_attention,
                                .learned = setup.learned};
  const std::string who = cat("merger '", setup.name, "', block ", index);
  const auto arguments = arguments_of(guard(who, "plan()", [&] { return setup.merger->plan(inputs, setup.schedule); }));
  const std::string wrong = kernels::check_merge(arguments, batch, x.size(1), model.tokens_after_[size_t(index)],
                                                 config().protected_tokens());
  if (!wrong.empty()) fail(ExitCode::plugin, who, ": ", wrong);
  kernels::Merged result = kernels::merge_tokens(x, sizes, arguments);
  x = std::move(result.tokens);
  sizes = std::move(result.sizes);
  merged = true;
}

void Vit::Pass::block(int64_t index) {
  const BlockParts& parts = model.parts_->blocks[size_t(index)];
  const MergeSetup* setup = model.merge_.get();
  const bool merges = setup && setup->merger->acts(x.size(1), model.tokens_after_[size_t(index)]);
  const sdk::Needs needs = merges ? setup->merger->needs() : sdk::Needs{};
  const double drop = options.training ? drop_path_rate(options.drop_path, index, config().depth) : 0.0;
  const int64_t dim = config().embed_dim;
  using sdk::LinearKind;

  at::Tensor normed =
      kernels::layer_norm(rows(), parts.norm1.weight, parts.norm1.bias, config().norm_eps, options.compute);
  const at::Tensor qkv = linear(parts, index, LinearKind::qkv, normed, {}).view({batch, x.size(1), 3 * dim});
  const kernels::AttentionOutput attention = attend(index, qkv, needs);
  x = linear(parts, index, LinearKind::proj, attention.out.view({-1, dim}),
             {.residual = rows(), .branch_scale = branch_scale(batch, drop, options.random, index, 0)})
          .view({batch, -1, dim});

  if (options.soft) x = options.soft->reduce(index, x);
  if (merges) merge(index, attention);

  normed = kernels::layer_norm(rows(), parts.norm2.weight, parts.norm2.bias, config().norm_eps, options.compute);
  const at::Tensor hidden = linear(parts, index, LinearKind::fc1, normed, {.activation = kernels::Activation::gelu});
  x = linear(parts, index, LinearKind::fc2, hidden,
             {.residual = rows(), .branch_scale = branch_scale(batch, drop, options.random, index, 1)})
          .view({batch, -1, dim});
}

at::Tensor Vit::Pass::patch_mean() const {
  const at::Tensor patches = x.slice(1, config().protected_tokens());
  if (!options.soft) return patches.mean(1);
  const at::Tensor mask = options.soft->mask().slice(1, config().protected_tokens()).unsqueeze(-1);
  return (patches * mask).sum(1) / mask.sum(1);
}

at::Tensor Vit::Pass::head() const {
  const Parts& parts = *model.parts_;
  const auto logits = [&](const at::Tensor& features, const kernels::LinearWeights& layer) {
    const at::Tensor normed =
        kernels::layer_norm(features.contiguous(), parts.norm.weight, parts.norm.bias, config().norm_eps, at::kFloat);
    return kernels::linear(normed, layer);
  };
  if (config().pool == Pool::avg) return logits(patch_mean(), parts.heads[0]);
  // Only the rows that a head reads are normalised.
  const at::Tensor by_class = logits(x.select(1, 0), parts.heads[0]);
  if (!config().distilled) return by_class;
  return (by_class + logits(x.select(1, 1), parts.heads[1])) / 2;
}

at::Tensor Vit::forward(const at::Tensor& images, const ForwardOptions& options) const {
  const int64_t side = config_.image_size;
  if (images.dim() != 4 || images.size(1) != 3 || images.size(2) != side || images.size(3) != side ||
      images.scalar_type() != at::kFloat)
    fail(ExitCode::internal, "forward: images are ", images.sizes(), " ", images.scalar_type(), ", expected [B, 3, ",
         side, ", ", side, "] Float");
  if (config_.num_classes == 0) fail(ExitCode::usage, "the model has no head: fine-tune it first");
  if (options.soft && merge_) fail(ExitCode::internal, "forward: a soft reduction in a model that merges already");
  Pass pass{.model = *this, .options = options, .batch = images.size(0), .x = {}, .sizes = {}};
  pass.embed(images);
  for (int64_t i = 0; i < config_.depth; ++i) {
    pass.block(i);
    if (options.trace) options.trace(i, pass.x, pass.sizes);
  }
  return pass.head();
}

}  // namespace pyra::nn
