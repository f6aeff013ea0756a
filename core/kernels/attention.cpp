#include "kernels/attention.h"

#include <cmath>
#include <utility>

#include "base/error.h"
#include "kernels/attention_path.h"
#include "kernels/cpu_kernel.h"

namespace pyra::kernels {
namespace {

void check(const at::Tensor& qkv, int64_t num_heads, const AttentionOptions& options) {
  if (qkv.dim() != 3 || (qkv.scalar_type() != at::kFloat && qkv.scalar_type() != at::kBFloat16) ||
      !qkv.is_contiguous()) {
    fail(ExitCode::internal, "attention: qkv is ", qkv.sizes(), " ", qkv.scalar_type(),
         ", expected contiguous [B,N,3C] fp32 or bf16");
  }
  if (num_heads < 1 || qkv.size(1) < 1 || qkv.size(2) < 1 || qkv.size(2) % (3 * num_heads) != 0) {
    fail(ExitCode::internal, "attention: qkv ", qkv.sizes(), " does not divide into q, k and v of ", num_heads,
         " heads");
  }
  const at::Tensor& sizes = options.sizes;
  if (sizes.defined() && (sizes.dim() != 2 || sizes.size(0) != qkv.size(0) || sizes.size(1) != qkv.size(1) ||
                          sizes.scalar_type() != at::kFloat || !sizes.is_contiguous())) {
    fail(ExitCode::internal, "attention: sizes is ", sizes.sizes(), " ", sizes.scalar_type(), ", expected contiguous [",
         qkv.size(0), ",", qkv.size(1), "] fp32");
  }
}

AttentionForward forward_path(const at::Tensor& qkv, int64_t num_heads, const AttentionOptions& options, bool keep) {
#if defined(PYRA_SIMD_X86)
  if (cpu_kernel() != CpuKernel::aten) return attention_forward_simd(qkv, num_heads, options, keep);
#endif
  return attention_forward_aten(qkv, num_heads, options, keep);
}

at::Tensor backward_path(const AttentionBackward& saved) {
#if defined(PYRA_SIMD_X86)
  if (cpu_kernel() != CpuKernel::aten) return attention_backward_simd(saved);
#endif
  return attention_backward_aten(saved);
}

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  /// Returns out, key_mean and class_attention; those not wanted are empty.
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const at::Tensor& qkv,
                                                const std::optional<at::Tensor>& sizes, int64_t num_heads,
                                                bool key_mean, bool class_attention) {
    const AttentionOptions options{sizes.value_or(at::Tensor()), key_mean, class_attention};
    AttentionForward result = forward_path(qkv, num_heads, options, /*keep=*/true);
    context->saved_data["num_heads"] = num_heads;
    context->save_for_backward({qkv, result.log_sum, options.sizes});
    for (at::Tensor* extra : {&result.output.key_mean, &result.output.class_attention}) {
      if (!extra->defined()) *extra = at::empty({0}, at::kFloat);
    }
    context->mark_non_differentiable({result.output.key_mean, result.output.class_attention});
    context->set_materialize_grads(false);
    return {result.output.out, result.output.key_mean, result.output.class_attention};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list dys) {
    if (!dys[0].defined()) return {{}, {}, {}, {}, {}};
    const auto saved = context->get_saved_variables();
    const at::Tensor dqkv =
        backward_path({dys[0].contiguous(), saved[0], saved[1], saved[2], context->saved_data["num_heads"].toInt()});
    return {dqkv, {}, {}, {}, {}};
  }
};

}  // namespace

AttentionOutput attention(const at::Tensor& qkv, int64_t num_heads, const AttentionOptions& options) {
  check(qkv, num_heads, options);
  if (!(at::GradMode::is_enabled() && qkv.requires_grad())) {
    return forward_path(qkv, num_heads, options, /*keep=*/false).output;
  }
  const std::optional<at::Tensor> sizes =
      options.sizes.defined() ? std::optional(options.sizes.detach()) : std::nullopt;
  const auto results = AttentionFunction::apply(qkv, sizes, num_heads, options.key_mean, options.class_attention);
  return {results[0], options.key_mean ? results[1] : at::Tensor(),
          options.class_attention ? results[2] : at::Tensor()};
}

AttentionOutput attention_reference(const at::Tensor& qkv, int64_t num_heads, const AttentionOptions& options) {
  const int64_t batch = qkv.size(0), tokens = qkv.size(1), channels = qkv.size(2) / 3, head_dim = channels / num_heads;
  const at::Tensor wide = qkv.scalar_type() == at::kBFloat16 ? qkv.to(at::kFloat) : qkv;
  const auto parts = wide.view({batch, tokens, 3, num_heads, head_dim}).permute({2, 0, 3, 1, 4}).unbind();
  at::Tensor logits = at::matmul(parts[0] / std::sqrt(double(head_dim)), parts[1].transpose(-1, -2));
  if (options.sizes.defined()) logits = logits + at::log(options.sizes).view({batch, 1, 1, tokens});
  const at::Tensor probabilities = at::softmax(logits, -1);
  AttentionOutput result;
  result.out = at::matmul(probabilities, parts[2])
                   .permute({0, 2, 1, 3})
                   .reshape({batch, tokens, channels})
                   .to(qkv.scalar_type());
  if (options.key_mean) result.key_mean = parts[1].mean(1).detach();
  if (options.class_attention) result.class_attention = probabilities.select(2, 0).mean(1).detach();
  return result;
}

}  // namespace pyra::kernels
