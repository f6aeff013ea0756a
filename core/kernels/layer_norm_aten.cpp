// The path for CPUs without AVX2: plain ATen operations.
#include "kernels/layer_norm_path.h"

namespace pyra::kernels {

LayerNormForward layer_norm_forward_aten(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                         double eps, at::ScalarType out_dtype) {
  const auto [y, mean, rstd] = at::native_layer_norm(x, {x.size(1)}, weight, bias, eps);
  return {y.to(out_dtype), mean.view({-1}), rstd.view({-1})};
}

LayerNormGradients layer_norm_backward_aten(const LayerNormBackward& saved, const LayerNormWanted& wanted) {
  const at::Tensor mean = saved.mean.view({-1, 1}), rstd = saved.rstd.view({-1, 1});
  const auto [dx, dweight, dbias] =
      at::native_layer_norm_backward(saved.dy.to(at::kFloat), saved.x, {saved.x.size(1)}, mean, rstd, saved.weight,
                                     saved.weight, {wanted.x, wanted.weight, wanted.bias});
  return {dx, dweight, dbias};
}

}  // namespace pyra::kernels
