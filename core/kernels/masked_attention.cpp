#include "kernels/masked_attention.h"

#include <cmath>

#include "base/error.h"
#include "kernels/parallel.h"

namespace pyra::kernels {
namespace {

constexpr double kEps = 1e-6;

void check(const at::Tensor& qkv, int64_t num_heads, const at::Tensor& sizes, const at::Tensor& mask) {
  const bool fits = qkv.dim() == 3 && qkv.is_contiguous() && num_heads >= 1 && qkv.size(1) >= 1 && qkv.size(2) >= 1 &&
                    qkv.size(2) % (3 * num_heads) == 0 &&
                    (qkv.scalar_type() == at::kFloat || qkv.scalar_type() == at::kBFloat16);
  if (!fits)
    fail(ExitCode::internal, "masked attention: qkv is ", qkv.sizes(), " ", qkv.scalar_type(), ", ", num_heads,
         " heads; expected contiguous [B,N,3C] fp32 or bf16 that divides into them");
  for (const at::Tensor& rows : {sizes, mask})
    if (rows.sizes() != qkv.sizes().slice(0, 2) || rows.scalar_type() != at::kFloat)
      fail(ExitCode::internal, "masked attention: sizes or mask is ", rows.sizes(), " ", rows.scalar_type(),
           ", expected fp32 [", qkv.size(0), ",", qkv.size(1), "]");
}

/// One image's q, k, v as [H,N,D] fp32.
std::array<at::Tensor, 3> heads_of(const at::Tensor& qkv, int64_t num_heads) {
  const int64_t tokens = qkv.size(0), head_dim = qkv.size(1) / (3 * num_heads);
  const auto parts = qkv.to(at::kFloat).view({tokens, 3, num_heads, head_dim}).permute({1, 2, 0, 3}).unbind();
  return {parts[0].contiguous(), parts[1].contiguous(), parts[2].contiguous()};
}

/// [H,N,D] -> [N,H D].
at::Tensor side_by_side(const at::Tensor& heads) {
  return heads.transpose(0, 1).reshape({heads.size(1), -1});
}

/// What forward and backward both need of an image: [H,N,N] each, but for the row's maximum and sum, [H,N,1].
struct Scores {
  at::Tensor peak;           ///< the key with the highest logit
  at::Tensor bare;           ///< exp(logit - max), before the mask
  at::Tensor masked;         ///< the same after it
  at::Tensor sum;            ///< of `masked`, eps added
  at::Tensor probabilities;  ///< p
};

Scores scores_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& sizes, const at::Tensor& mask) {
  at::Tensor logits = at::matmul(q, k.transpose(1, 2)).mul_(1.0 / std::sqrt(double(q.size(2))));
  logits.add_(at::log(sizes));
  const auto [largest, peak] = logits.max(2, /*keepdim=*/true);
  Scores scores{.peak = peak, .bare = logits.sub_(largest).exp_(), .masked = {}, .sum = {}, .probabilities = {}};
  scores.masked = scores.bare * mask;
  scores.masked.diagonal(0, 1, 2).copy_(scores.bare.diagonal(0, 1, 2));
  scores.sum = scores.masked.sum(2, /*keepdim=*/true).add_(kEps);
  scores.probabilities = (scores.masked + kEps / double(q.size(1))).div_(scores.sum);
  return scores;
}

/// Calls body(image) for every image of the batch, on several threads, where nothing is recorded.
template <class Body>
void for_each_image(int64_t batch, const Body& body) {
  parallel_tasks(batch, [&](const auto& next) {
    const at::NoGradGuard no_gradients;  // of the thread: it is not inherited
    for (int64_t image = next(); image < batch; image = next()) body(image);
  });
}

MaskedAttentionOutput forward(const at::Tensor& qkv, int64_t num_heads, const at::Tensor& sizes,
                              const at::Tensor& mask) {
  const int64_t batch = qkv.size(0), tokens = qkv.size(1);
  MaskedAttentionOutput result{at::empty({batch, tokens, qkv.size(2) / 3}, qkv.options().requires_grad(false)),
                               at::empty({batch, tokens}, at::kFloat)};
  for_each_image(batch, [&](int64_t image) {
    const auto [q, k, v] = heads_of(qkv[image], num_heads);
    const Scores scores = scores_of(q, k, sizes[image], mask[image]);
    result.out[image].copy_(side_by_side(at::matmul(scores.probabilities, v)));
    result.class_attention[image].copy_(scores.probabilities.select(1, 0).mean(0));
  });
  return result;
}

struct Gradients {
  at::Tensor qkv, mask;
};

Gradients backward(const at::Tensor& dout, const at::Tensor& qkv, int64_t num_heads, const at::Tensor& sizes,
                   const at::Tensor& mask) {
  const int64_t batch = qkv.size(0), tokens = qkv.size(1);
  Gradients gradients{at::empty_like(qkv), at::empty_like(mask)};
  for_each_image(batch, [&](int64_t image) {
    const auto [q, k, v] = heads_of(qkv[image], num_heads);
    const Scores s = scores_of(q, k, sizes[image], mask[image]);
    const at::Tensor d = dout[image].to(at::kFloat).view({tokens, num_heads, -1}).transpose(0, 1).contiguous();
    const at::Tensor dp = at::matmul(d, v.transpose(1, 2));
    const at::Tensor mean = (dp * s.probabilities).sum(2, /*keepdim=*/true);
    // What mask and exponential share: dL/d(e before the mask) where the mask is one.
    at::Tensor shared = (dp - mean).div_(s.sum).mul_(s.bare);
    const at::Tensor own = shared.diagonal(0, 1, 2);
    gradients.mask[image].copy_(shared.sum(at::IntArrayRef({0, 1})) - own.sum(0));
    at::Tensor dlogits = shared * mask[image];
    dlogits.diagonal(0, 1, 2).copy_(own);
    // Without eps the maximum would drop out; with it a little flows through the key that has it.
    dlogits.scatter_add_(2, s.peak, dlogits.sum(2, /*keepdim=*/true).neg_());
    dlogits.mul_(1.0 / std::sqrt(double(q.size(2))));
    const at::Tensor dv = at::matmul(s.probabilities.transpose(1, 2), d);
    const at::Tensor dq = at::matmul(dlogits, k), dk = at::matmul(dlogits.transpose(1, 2), q);
    gradients.qkv[image].copy_(at::cat({side_by_side(dq), side_by_side(dk), side_by_side(dv)}, 1));
  });
  return gradients;
}

struct MaskedAttentionFunction : torch::autograd::Function<MaskedAttentionFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const at::Tensor& qkv,
                                                const at::Tensor& sizes, const at::Tensor& mask, int64_t num_heads) {
    const MaskedAttentionOutput result = kernels::forward(qkv.detach(), num_heads, sizes, mask.detach());
    context->saved_data["num_heads"] = num_heads;
    context->save_for_backward({qkv, sizes, mask});
    context->mark_non_differentiable({result.class_attention});
    context->set_materialize_grads(false);
    return {result.out, result.class_attention};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list dys) {
    if (!dys[0].defined()) return {{}, {}, {}, {}};
    const auto saved = context->get_saved_variables();
    const Gradients gradients =
        kernels::backward(dys[0].detach(), saved[0].detach(), context->saved_data["num_heads"].toInt(),
                          saved[1].detach(), saved[2].detach());
    return {gradients.qkv, {}, gradients.mask, {}};
  }
};

}  // namespace

MaskedAttentionOutput masked_attention(const at::Tensor& qkv, int64_t num_heads, const at::Tensor& sizes,
                                       const at::Tensor& mask) {
  check(qkv, num_heads, sizes, mask);
  if (!(at::GradMode::is_enabled() && (qkv.requires_grad() || mask.requires_grad())))
    return forward(qkv.detach(), num_heads, sizes, mask.detach());
  const auto results = MaskedAttentionFunction::apply(qkv, sizes.detach(), mask, num_heads);
  return {results[0], results[1]};
}

MaskedAttentionOutput masked_attention_reference(const at::Tensor& qkv, int64_t num_heads, const at::Tensor& sizes,
                                                 const at::Tensor& mask) {
  const int64_t batch = qkv.size(0), tokens = qkv.size(1), head_dim = qkv.size(2) / (3 * num_heads);
  const auto parts = qkv.view({batch, tokens, 3, num_heads, head_dim}).permute({2, 0, 3, 1, 4}).unbind();
  const at::Tensor logits = at::matmul(parts[0], parts[1].transpose(2, 3)) / std::sqrt(double(head_dim)) +
                            at::log(sizes).view({batch, 1, 1, tokens});
  const at::Tensor bare = at::exp(logits - std::get<0>(logits.max(3, /*keepdim=*/true)));
  const at::Tensor keys = mask.view({batch, 1, 1, tokens}), diagonal = at::eye(tokens, keys.options());
  const at::Tensor masked = bare * (keys + (1 - keys) * diagonal);
  const at::Tensor p = (masked + kEps / double(tokens)) / (masked.sum(3, /*keepdim=*/true) + kEps);
  return {at::matmul(p, parts[2]).permute({0, 2, 1, 3}).reshape({batch, tokens, num_heads * head_dim}),
          p.select(2, 0).mean(1).detach()};
}

}  // namespace pyra::kernels
