// The path for CPUs without AVX2: plain ATen operations in fp32, forward and backward written out.
//
// bf16 is widened: on such CPUs it saves memory, not time. ATen's matmul picks its own blocking, so here a row's last
// bits may depend on the number of rows; the micro-kernels' rows do not.
#include "kernels/linear_path.h"

namespace pyra::kernels {
namespace {

at::Tensor dropped(const at::Tensor& x, const Dropout& dropout) {
  if (dropout.p <= 0) return x;
  return x * dropout_multipliers(dropout, x.numel()).view(x.sizes());
}

/// dL/d(pre-activation): dy through branch_scale and the activation.
at::Tensor pre_activation_gradient(const LinearBackward& saved, const LinearOptions& options) {
  at::Tensor dz = saved.dy.to(at::kFloat);
  if (options.branch_scale.defined()) dz = dz * scale_of_rows(options.branch_scale, dz.size(0));
  if (saved.slope.defined()) dz = dz * saved.slope;
  return dz;
}

}  // namespace

at::Tensor scale_of_rows(const at::Tensor& branch_scale, int64_t rows) {
  const int64_t images = branch_scale.numel();
  return branch_scale.view({images, 1}).expand({images, rows / images}).reshape({rows, 1}).contiguous();
}

at::Tensor rounded_weight(const at::Tensor& weight, at::ScalarType compute) {
  return compute == at::kBFloat16 ? weight.to(at::kBFloat16).to(at::kFloat) : weight;
}

LinearForward linear_forward_aten(const at::Tensor& x, const LinearWeights& layer, const LinearOptions& options,
                                  bool keep) {
  LinearForward result;
  const at::Tensor wide = x.to(at::kFloat);
  at::Tensor z = at::linear(wide, rounded_weight(layer.weight(), x.scalar_type()), layer.bias());
  if (options.low_rank) {
    const LowRankTerm& term = *options.low_rank;
    const at::Tensor hidden = at::matmul(dropped(wide, term.dropout), term.a.t());
    z.addmm_(hidden, term.b.t(), 1.0, term.scale);
    if (keep) result.hidden = hidden;
  }
  at::Tensor y = z;
  if (options.activation == Activation::gelu) {
    y = at::gelu(z);
    if (keep) {
      const at::Tensor phi = at::exp(z * z * -0.5) * 0.3989422804014327;
      result.slope = (at::erf(z * 0.7071067811865476) + 1.0) * 0.5 + z * phi;
    }
  }
  if (options.branch_scale.defined()) y = y * scale_of_rows(options.branch_scale, y.size(0));
  result.y = options.residual.defined() ? options.residual + y : y.to(x.scalar_type());
  return result;
}

LinearGradients linear_backward_aten(const LinearBackward& saved, const LinearWeights& layer,
                                     const LinearOptions& options, const LinearWanted& wanted) {
  LinearGradients gradients;
  const at::Tensor dz = pre_activation_gradient(saved, options);
  if (wanted.weight) gradients.weight = at::matmul(dz.t(), saved.x.to(at::kFloat));
  if (wanted.bias) gradients.bias = dz.sum(0);
  at::Tensor dx = wanted.x ? at::matmul(dz, rounded_weight(layer.weight(), saved.compute)) : at::Tensor();
  if (options.low_rank) {
    const LowRankTerm& term = *options.low_rank;
    if (wanted.b) gradients.b = at::matmul(dz.t(), saved.hidden) * term.scale;
    if (wanted.a || wanted.x) {
      const at::Tensor dhidden = at::matmul(dz, term.b) * term.scale;
      if (wanted.a) gradients.a = at::matmul(dhidden.t(), dropped(saved.x.to(at::kFloat), term.dropout));
      if (wanted.x) dx = dx + dropped(at::matmul(dhidden, term.a), term.dropout);
    }
  }
  if (wanted.x) gradients.x = dx.to(saved.compute);
  return gradients;
}

}  // namespace pyra::kernels
