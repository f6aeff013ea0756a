#include "kernels/layer_norm.h"

#include "base/error.h"
#include "kernels/cpu_kernel.h"
#include "kernels/layer_norm_path.h"

namespace pyra::kernels {
namespace {

void check(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::ScalarType out_dtype) {
  if (x.dim() != 2 || x.scalar_type() != at::kFloat || !x.is_contiguous()) {
    fail(ExitCode::internal, "layer_norm: x is ", x.sizes(), " ", x.scalar_type(),
         ", expected contiguous [rows,C] fp32");
  }
  for (const at::Tensor& vector : {weight, bias}) {
    if (vector.dim() != 1 || vector.size(0) != x.size(1) || vector.scalar_type() != at::kFloat ||
        !vector.is_contiguous()) {
      fail(ExitCode::internal, "layer_norm: weight or bias is ", vector.sizes(), " ", vector.scalar_type(),
           ", expected contiguous [", x.size(1), "] fp32");
    }
  }
  if (out_dtype != at::kFloat && out_dtype != at::kBFloat16) {
    fail(ExitCode::internal, "layer_norm: result wanted in ", out_dtype, ", expected fp32 or bf16");
  }
}

LayerNormForward forward_path(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps,
                              at::ScalarType out_dtype, [[maybe_unused]] bool keep) {
#if defined(PYRA_SIMD_X86)
  if (cpu_kernel() != CpuKernel::aten) return layer_norm_forward_simd(x, weight, bias, eps, out_dtype, keep);
#endif
  return layer_norm_forward_aten(x, weight, bias, eps, out_dtype);
}

LayerNormGradients backward_path(const LayerNormBackward& saved, const LayerNormWanted& wanted) {
#if defined(PYRA_SIMD_X86)
  if (cpu_kernel() != CpuKernel::aten) return layer_norm_backward_simd(saved, wanted);
#endif
  return layer_norm_backward_aten(saved, wanted);
}

struct LayerNormFunction : torch::autograd::Function<LayerNormFunction> {
  enum Input : size_t { kX, kWeight, kBias };

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& bias, double eps, at::ScalarType out_dtype) {
    LayerNormForward result = forward_path(x, weight, bias, eps, out_dtype, /*keep=*/true);
    context->save_for_backward({x, weight, result.mean, result.rstd});
    return result.y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list dys) {
    const auto saved = context->get_saved_variables();
    const LayerNormWanted wanted{context->needs_input_grad(kX), context->needs_input_grad(kWeight),
                                 context->needs_input_grad(kBias)};
    const auto gradients = backward_path({dys[0].contiguous(), saved[0], saved[1], saved[2], saved[3]}, wanted);
    return {gradients.x, gradients.weight, gradients.bias, {}, {}};
  }
};

}  // namespace

at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps,
                      at::ScalarType out_dtype) {
  check(x, weight, bias, out_dtype);
  if (at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad() || bias.requires_grad())) {
    return LayerNormFunction::apply(x, weight, bias, eps, out_dtype);
  }
  return forward_path(x, weight, bias, eps, out_dtype, /*keep=*/false).y;
}

at::Tensor layer_norm_reference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps,
                                at::ScalarType out_dtype) {
  const at::Tensor centred = x - x.mean(-1, /*keepdim=*/true);
  const at::Tensor variance = (centred * centred).mean(-1, /*keepdim=*/true);
  return (centred * at::rsqrt(variance + eps) * weight + bias).to(out_dtype);
}

}  // namespace pyra::kernels
