#include "kernels/merge.h"

namespace pyra::kernels {
namespace {

at::Tensor pick(const at::Tensor& rows, const at::Tensor& index) {
  return rows.gather(1, index.unsqueeze(-1).expand({index.size(0), index.size(1), rows.size(2)}));
}

at::Tensor gated(const at::Tensor& source, const at::Tensor& destination, const MergeGate& gate) {
  const at::Tensor p = at::layer_norm(source + destination, {source.size(2)}, gate.weight, gate.bias, gate.eps);
  const at::Tensor channels = 2 * at::sigmoid(at::matmul(gate.a.t(), p));    // [B,1,C]
  const at::Tensor tokens = 2 * at::sigmoid(at::matmul(p, gate.b.t())) - 1;  // [B,R,1]
  return source + source * channels * tokens;
}

}  // namespace

Merged merge_tokens_reference(const at::Tensor& x, const at::Tensor& sizes, const MergeArguments& arguments) {
  const at::Tensor unit =
      arguments.weighted ? sizes.detach().to(x.scalar_type()) : at::ones({x.size(0), x.size(1)}, x.options());
  const at::Tensor weighted = x * unit.unsqueeze(-1);
  const at::Tensor kept = pick(weighted, arguments.keep);
  const at::Tensor src_unit = unit.gather(1, arguments.src);
  at::Tensor source = pick(weighted, arguments.src);
  if (arguments.gate) source = gated(source, pick(kept, arguments.dst), *arguments.gate);
  at::Tensor share = src_unit;
  if (arguments.src_weight.defined()) {
    source = source * arguments.src_weight.unsqueeze(-1);
    share = share * arguments.src_weight;
  }
  const at::Tensor sum = kept.scatter_add(1, arguments.dst.unsqueeze(-1).expand_as(source), source);
  const at::Tensor divisor = unit.gather(1, arguments.keep).scatter_add(1, arguments.dst, share);

  at::Tensor added = sizes.detach().gather(1, arguments.src);
  if (arguments.src_size_scale.defined()) added = added * arguments.src_size_scale.detach().clamp_min(0);
  return {sum / divisor.unsqueeze(-1), sizes.detach().gather(1, arguments.keep).scatter_add(1, arguments.dst, added)};
}

}  // namespace pyra::kernels
