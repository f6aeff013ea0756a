#include "kernels/linear.h"

#include <utility>

#include "base/error.h"
#include "kernels/cpu_kernel.h"
#include "kernels/linear_path.h"

namespace pyra::kernels {
namespace {

void check_vector(const char* what, const at::Tensor& tensor, int64_t length) {
  if (!tensor.defined()) return;
  if (tensor.dim() != 1 || tensor.size(0) != length || tensor.scalar_type() != at::kFloat || !tensor.is_contiguous()) {
    fail(ExitCode::internal, "linear: ", what, " is ", tensor.sizes(), " ", tensor.scalar_type(),
         ", expected contiguous [", length, "] fp32");
  }
}

void check_matrix(const char* what, const at::Tensor& tensor, int64_t rows, int64_t columns) {
  if (!tensor.defined() || tensor.dim() != 2 || tensor.size(0) != rows || tensor.size(1) != columns ||
      tensor.scalar_type() != at::kFloat || !tensor.is_contiguous()) {
    fail(ExitCode::internal, "linear: ", what, " is ",
         tensor.defined() ? cat(tensor.sizes(), " ", tensor.scalar_type()) : "undefined", ", expected contiguous [",
         rows, ",", columns, "] fp32");
  }
}

void check(const at::Tensor& x, const LinearWeights& layer, const LinearOptions& options) {
  const int64_t out = layer.weight().size(0), in = layer.weight().size(1);
  if (x.dim() != 2 || x.size(1) != in || (x.scalar_type() != at::kFloat && x.scalar_type() != at::kBFloat16) ||
      !x.is_contiguous()) {
    fail(ExitCode::internal, "linear: x is ", x.sizes(), " ", x.scalar_type(), ", expected contiguous [rows,", in,
         "] fp32 or bf16");
  }
  check_matrix("weight", layer.weight(), out, in);
  check_vector("bias", layer.bias(), out);
  if (options.residual.defined()) check_matrix("residual", options.residual, x.size(0), out);
  if (options.branch_scale.defined()) {
    check_vector("branch_scale", options.branch_scale, options.branch_scale.numel());
    const int64_t images = options.branch_scale.numel();
    if (images == 0 || x.size(0) % images != 0) {
      fail(ExitCode::internal, "linear: ", x.size(0), " rows do not divide into branch_scale's ", images, " images");
    }
  }
  if (options.low_rank) {
    const LowRankTerm& term = *options.low_rank;
    const int64_t rank = term.a.defined() && term.a.dim() == 2 ? term.a.size(0) : 0;
    check_matrix("low_rank.a", term.a, rank, in);
    check_matrix("low_rank.b", term.b, out, rank);
    if (!(term.dropout.p >= 0 && term.dropout.p < 1)) {
      fail(ExitCode::internal, "linear: dropout p is ", term.dropout.p, ", expected 0 <= p < 1");
    }
  }
}

/// What backward needs besides tensors.
struct Saved : torch::CustomClassHolder {
  Saved(LinearWeights layer_, LinearOptions options_) : layer(std::move(layer_)), options(std::move(options_)) {}
  LinearWeights layer;
  LinearOptions options;
};

/// Masks are made of whole bytes a row there; other widths with dropout take the ATen path.
bool micro_kernels_apply([[maybe_unused]] const LinearWeights& layer, [[maybe_unused]] const LinearOptions& options) {
#if defined(PYRA_SIMD_X86)
  const bool odd_mask = options.low_rank && options.low_rank->dropout.p > 0 && layer.weight().size(1) % 8 != 0;
  return cpu_kernel() != CpuKernel::aten && !odd_mask;
#else
  return false;
#endif
}

LinearForward forward_path(const at::Tensor& x, const LinearWeights& layer, const LinearOptions& options, bool keep) {
#if defined(PYRA_SIMD_X86)
  if (micro_kernels_apply(layer, options)) return linear_forward_simd(x, layer, options, keep);
#endif
  return linear_forward_aten(x, layer, options, keep);
}

LinearGradients backward_path(const LinearBackward& saved, const LinearWeights& layer, const LinearOptions& options,
                              const LinearWanted& wanted) {
#if defined(PYRA_SIMD_X86)
  if (micro_kernels_apply(layer, options)) return linear_backward_simd(saved, layer, options, wanted);
#endif
  return linear_backward_aten(saved, layer, options, wanted);
}

using OptionalTensor = std::optional<at::Tensor>;

OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  /// The optional tensors stand in `layer` and `options` too; here autograd sees them.
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const OptionalTensor& /*bias*/, const OptionalTensor& a, const OptionalTensor& /*b*/,
                            const OptionalTensor& residual, const LinearWeights& layer, const LinearOptions& options) {
    LinearForward result = forward_path(x, layer, options, /*keep=*/true);
    // A frozen layer's input is not needed again: nothing of it is kept.
    const bool keep_x = weight.requires_grad() || a.has_value();
    context->save_for_backward({keep_x ? x : at::Tensor(), result.slope, result.hidden});
    context->saved_data["compute"] = x.scalar_type();
    context->saved_data["residual"] = residual.has_value();
    LinearOptions kept = options;
    kept.residual = at::Tensor();
    context->saved_data["saved"] = c10::IValue::make_capsule(c10::make_intrusive<Saved>(layer, std::move(kept)));
    return result.y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list dys) {
    const auto capsule = context->saved_data["saved"].toCapsule();
    const auto& saved = static_cast<const Saved&>(*capsule);
    // Autograd numbers the inputs that are there.
    size_t input = 0;
    const auto next = [&](bool present) { return present && context->needs_input_grad(input++); };
    LinearWanted wanted;
    wanted.x = next(true);
    wanted.weight = next(true);
    wanted.bias = next(saved.layer.bias().defined());
    wanted.a = next(saved.options.low_rank.has_value());
    wanted.b = next(saved.options.low_rank.has_value());
    const bool residual = next(context->saved_data["residual"].toBool());
    const auto tensors = context->get_saved_variables();
    const LinearGradients gradients = backward_path(
        {dys[0].contiguous(), tensors[0], tensors[1], tensors[2], context->saved_data["compute"].toScalarType()},
        saved.layer, saved.options, wanted);
    return {gradients.x,  gradients.weight, gradients.bias, gradients.a, gradients.b, residual ? dys[0] : at::Tensor(),
            at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor linear(const at::Tensor& x, const LinearWeights& layer, const LinearOptions& options) {
  check(x, layer, options);
  const at::Tensor a = options.low_rank ? options.low_rank->a : at::Tensor();
  const at::Tensor b = options.low_rank ? options.low_rank->b : at::Tensor();
  const auto learns = [](const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); };
  const bool gradients = at::GradMode::is_enabled() && (learns(x) || learns(layer.weight()) || learns(layer.bias()) ||
                                                        learns(a) || learns(b) || learns(options.residual));
  if (!gradients) return forward_path(x, layer, options, /*keep=*/false).y;
  return LinearFunction::apply(x, layer.weight(), optional(layer.bias()), optional(a), optional(b),
                               optional(options.residual), layer, options);
}

at::Tensor linear_reference(const at::Tensor& x, const LinearWeights& layer, const LinearOptions& options) {
  const at::Tensor& master = layer.weight();
  const at::Tensor wide = x.to(master.scalar_type());
  const at::Tensor weight =
      x.scalar_type() == at::kBFloat16 ? master.to(at::kBFloat16).to(master.scalar_type()) : master;
  at::Tensor y = at::linear(wide, weight, layer.bias());
  if (options.low_rank) {
    const LowRankTerm& term = *options.low_rank;
    at::Tensor input = wide;
    if (term.dropout.p > 0) input = input * dropout_multipliers(term.dropout, x.numel()).view(x.sizes());
    y = y + at::matmul(at::matmul(input, term.a.t()), term.b.t()) * term.scale;
  }
  if (options.activation == Activation::gelu) y = at::gelu(y);
  if (options.branch_scale.defined()) y = y * scale_of_rows(options.branch_scale, y.size(0));
  return options.residual.defined() ? options.residual + y : y.to(x.scalar_type());
}

}  // namespace pyra::kernels
