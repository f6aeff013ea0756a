// One pass over the tokens of an image. Division by the summed sizes is folded into the factor each token is added
// with, so a kept token is read and written once. The gate's backward recomputes what the forward computed: it keeps
// the input tokens, which the model holds anyway, and nothing else.
#include "kernels/merge.h"

#include "base/error.h"
#include "kernels/merge_image.h"
#include "kernels/parallel.h"

namespace pyra::kernels {
namespace {

using namespace merge_image;

/// Runs `image(plan of the image, scratch, number)` for every image, in parallel, for the widest instruction set.
template <class Image>
void for_images(const Plan& plan, int64_t batch, const Image& image) {
  parallel_tasks(batch, [&](const auto& next) {
    Scratch scratch(plan);
    with_isa(widest_isa(), [&](auto) PYRA_INLINE_LAMBDA {
      for (int64_t i = next(); i < batch; i = next()) image(plan.image(i), scratch, i);
    });
  });
}

/// The tensors behind a Plan, contiguous.
struct Tensors {
  at::Tensor x, sizes, keep, src, dst, src_weight, size_scale;
  at::Tensor a{}, b{}, weight{}, bias{};
  bool weighted = true;
  bool gated = false;
  double eps = 0;
};

const float* floats(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

at::Tensor contiguous(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.contiguous() : tensor;
}

Tensors tensors_of(const at::Tensor& x, const at::Tensor& sizes, const MergeArguments& arguments) {
  Tensors t{.x = x.contiguous(),
            .sizes = sizes.contiguous(),
            .keep = arguments.keep.contiguous(),
            .src = arguments.src.contiguous(),
            .dst = arguments.dst.contiguous(),
            .src_weight = contiguous(arguments.src_weight),
            .size_scale = contiguous(arguments.src_size_scale),
            .weighted = arguments.weighted};
  // A gate that opens for no token is no gate; its tensors would have no rows.
  if (arguments.gate && t.src.size(1) > 0) {
    const MergeGate& gate = *arguments.gate;
    t.gated = true;
    t.eps = gate.eps;
    t.a = gate.a.contiguous();
    t.b = gate.b.contiguous();
    t.weight = gate.weight.contiguous();
    t.bias = gate.bias.contiguous();
  }
  return t;
}

Gate gate_of(const Tensors& t) {
  return {floats(t.a), floats(t.b), floats(t.weight), floats(t.bias), float(t.eps)};
}

Plan plan_of(const Tensors& t, const Gate& gate) {
  return {.tokens = t.x.size(1),
          .kept = t.keep.size(1),
          .merged = t.src.size(1),
          .width = t.x.size(2),
          .x = floats(t.x),
          .sizes = floats(t.sizes),
          .keep = t.keep.const_data_ptr<int64_t>(),
          .src = t.src.const_data_ptr<int64_t>(),
          .dst = t.dst.const_data_ptr<int64_t>(),
          .src_weight = floats(t.src_weight),
          .size_scale = floats(t.size_scale),
          .weighted = t.weighted,
          .gate = t.gated ? &gate : nullptr};
}

Merged forward(const Tensors& t) {
  const Gate gate = gate_of(t);
  const Plan plan = plan_of(t, gate);
  const int64_t batch = t.x.size(0);
  Merged out{at::empty({batch, plan.kept, plan.width}, t.x.options()), at::empty({batch, plan.kept}, t.x.options())};
  float* tokens = out.tokens.data_ptr<float>();
  float* sizes = out.sizes.data_ptr<float>();
  for_images(plan, batch, [=](const Plan& p, Scratch& scratch, int64_t i) PYRA_INLINE_LAMBDA {
    forward_image(p, scratch, tokens + i * p.kept * p.width, sizes + i * p.kept);
  });
  return out;
}

/// Rows [B,n] -> their sum, image by image.
at::Tensor sum_images(const at::Tensor& rows, int64_t begin, at::IntArrayRef shape) {
  auto sum = at::zeros(shape, rows.options());
  float* to = sum.data_ptr<float>();
  const float* from = rows.const_data_ptr<float>() + begin;
  for (int64_t i = 0; i < rows.size(0); ++i, from += rows.size(1)) {
    for (int64_t c = 0; c < sum.numel(); ++c) to[c] += from[c];
  }
  return sum;
}

struct TensorGradients {
  at::Tensor x, a, b, weight, bias, src_weight;
};

TensorGradients backward(const Tensors& t, const at::Tensor& merged, const at::Tensor& given, bool want_x,
                         bool want_src_weight) {
  const Gate gate = gate_of(t);
  const Plan plan = plan_of(t, gate);
  const int64_t batch = t.x.size(0), gate_size = plan.merged + 3 * plan.width;
  TensorGradients out;
  at::Tensor gate_rows;
  if (want_x) out.x = at::empty_like(t.x);
  if (want_src_weight) out.src_weight = at::empty_like(t.src_weight);
  if (t.gated) gate_rows = at::empty({batch, gate_size}, t.x.options());
  const at::Tensor given_rows = given.contiguous();
  const float* given_data = floats(given_rows);
  const float* merged_data = floats(merged);
  float* x = want_x ? out.x.data_ptr<float>() : nullptr;
  float* weights = want_src_weight ? out.src_weight.data_ptr<float>() : nullptr;
  float* gates = t.gated ? gate_rows.data_ptr<float>() : nullptr;
  for_images(plan, batch, [=](const Plan& p, Scratch& scratch, int64_t i) PYRA_INLINE_LAMBDA {
    Gradients g{};
    g.out = given_data + i * p.kept * p.width;
    g.merged = merged_data ? merged_data + i * p.kept * p.width : nullptr;
    g.x = x ? x + i * p.tokens * p.width : nullptr;
    g.src_weight = weights ? weights + i * p.merged : nullptr;
    g.a = gates ? gates + i * gate_size : nullptr;
    g.b = gates ? g.a + p.merged : nullptr;
    g.weight = gates ? g.b + p.width : nullptr;
    g.bias = gates ? g.weight + p.width : nullptr;
    backward_image(p, g, scratch);
  });
  if (t.gated) {
    out.a = sum_images(gate_rows, 0, {plan.merged, 1});
    out.b = sum_images(gate_rows, plan.merged, {1, plan.width});
    out.weight = sum_images(gate_rows, plan.merged + plan.width, {plan.width});
    out.bias = sum_images(gate_rows, plan.merged + 2 * plan.width, {plan.width});
  }
  return out;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class MergeFunction : public torch::autograd::Function<MergeFunction> {
 public:
  // Tensors that may require gradients are arguments of their own, so that autograd sees them; an undefined one is
  // no argument to it, hence the optionals.
  using Optional = std::optional<at::Tensor>;
  static variable_list forward(AutogradContext* context, const at::Tensor& /*x*/, const Optional& /*a*/,
                               const Optional& /*b*/, const Optional& /*weight*/, const Optional& /*bias*/,
                               const Optional& src_weight, const Tensors& t) {
    Merged merged = kernels::forward(t);
    const bool reads_merged = src_weight && src_weight->requires_grad();
    context->save_for_backward({t.x, t.sizes, t.keep, t.src, t.dst, t.src_weight, t.size_scale, t.a, t.b, t.weight,
                                t.bias, reads_merged ? merged.tokens : at::Tensor()});
    context->saved_data["weighted"] = t.weighted;
    context->saved_data["gated"] = t.gated;
    context->saved_data["eps"] = t.eps;
    context->mark_non_differentiable({merged.sizes});
    return {merged.tokens, merged.sizes};
  }

  static variable_list backward(AutogradContext* context, variable_list given) {
    const variable_list saved = context->get_saved_variables();
    const Tensors t{.x = saved[0],
                    .sizes = saved[1],
                    .keep = saved[2],
                    .src = saved[3],
                    .dst = saved[4],
                    .src_weight = saved[5],
                    .size_scale = saved[6],
                    .a = saved[7],
                    .b = saved[8],
                    .weight = saved[9],
                    .bias = saved[10],
                    .weighted = context->saved_data["weighted"].toBool(),
                    .gated = context->saved_data["gated"].toBool(),
                    .eps = context->saved_data["eps"].toDouble()};
    TensorGradients g = kernels::backward(t, saved[11], given[0], context->needs_input_grad(0), saved[11].defined());
    return {g.x, g.a, g.b, g.weight, g.bias, g.src_weight, at::Tensor()};
  }
};

bool wants_gradient(const at::Tensor& tensor) {
  return tensor.defined() && tensor.requires_grad();
}

void check(const at::Tensor& x, const at::Tensor& sizes, const MergeArguments& arguments) {
  if (!x.defined() || x.dim() != 3 || x.scalar_type() != at::kFloat || !sizes.defined() ||
      sizes.scalar_type() != at::kFloat || sizes.sizes() != x.sizes().slice(0, 2) || !x.is_cpu() || !sizes.is_cpu()) {
    fail(ExitCode::internal, "merge: expected tokens [B,N,C] and sizes [B,N], both fp32 and on the CPU");
  }
  if (arguments.gate && arguments.gate->weight.numel() != x.size(2)) {
    fail(ExitCode::plugin, "merge: the gate is for tokens of width ", arguments.gate->weight.numel(),
         "; the model's have ", x.size(2));
  }
}

}  // namespace

Merged merge_tokens(const at::Tensor& x, const at::Tensor& sizes, const MergeArguments& arguments) {
  check(x, sizes, arguments);
  const Tensors t = tensors_of(x, sizes, arguments);
  const bool records =
      at::GradMode::is_enabled() &&
      (wants_gradient(x) || wants_gradient(t.src_weight) ||
       (t.gated && (wants_gradient(t.a) || wants_gradient(t.b) || wants_gradient(t.weight) || wants_gradient(t.bias))));
  if (!records) return forward(t);
  const auto argument = [](const at::Tensor& tensor) {
    return tensor.defined() ? std::optional(tensor) : std::nullopt;
  };
  const variable_list out = MergeFunction::apply(x, argument(t.a), argument(t.b), argument(t.weight), argument(t.bias),
                                                 argument(t.src_weight), t);
  return {out[0], out[1]};
}

}  // namespace pyra::kernels
