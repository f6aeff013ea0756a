// The path for CPUs without AVX2: plain ATen operations in fp32, forward and backward written out.
#include <cmath>
#include <utility>

#include "kernels/attention_path.h"

namespace pyra::kernels {
namespace {

/// qkv [B,N,3C] -> q, k, v as [B,H,N,D] fp32.
std::array<at::Tensor, 3> split_heads(const at::Tensor& qkv, int64_t num_heads) {
  const int64_t batch = qkv.size(0), tokens = qkv.size(1), head_dim = qkv.size(2) / (3 * num_heads);
  const auto parts = qkv.to(at::kFloat).view({batch, tokens, 3, num_heads, head_dim}).permute({2, 0, 3, 1, 4}).unbind();
  return {parts[0], parts[1], parts[2]};
}

at::Tensor logits_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& sizes) {
  at::Tensor logits = at::matmul(q, k.transpose(-1, -2)) * (1.0 / std::sqrt(double(q.size(-1))));
  if (sizes.defined()) logits.add_(at::log(sizes).view({sizes.size(0), 1, 1, sizes.size(1)}));
  return logits;
}

at::Tensor join_heads(const at::Tensor& heads) {
  return heads.permute({0, 2, 1, 3}).reshape({heads.size(0), heads.size(2), heads.size(1) * heads.size(3)});
}

}  // namespace

AttentionForward attention_forward_aten(const at::Tensor& qkv, int64_t num_heads, const AttentionOptions& options,
                                        bool keep) {
  const auto [q, k, v] = split_heads(qkv, num_heads);
  const at::Tensor logits = logits_of(q, k, options.sizes);
  const at::Tensor probabilities = at::softmax(logits, -1);
  AttentionForward result;
  result.output.out = join_heads(at::matmul(probabilities, v)).to(qkv.scalar_type());
  if (options.key_mean) result.output.key_mean = k.mean(1);
  if (options.class_attention) result.output.class_attention = probabilities.select(2, 0).mean(1);
  if (keep) result.log_sum = at::logsumexp(logits, -1);
  return result;
}

at::Tensor attention_backward_aten(const AttentionBackward& saved) {
  const auto [q, k, v] = split_heads(saved.qkv, saved.num_heads);
  const at::Tensor probabilities = at::exp(logits_of(q, k, saved.sizes) - saved.log_sum.unsqueeze(-1));
  const at::Tensor dout =
      saved.dout.to(at::kFloat).view({q.size(0), q.size(2), q.size(1), q.size(3)}).permute({0, 2, 1, 3});
  const at::Tensor dv = at::matmul(probabilities.transpose(-1, -2), dout);
  const at::Tensor dp = at::matmul(dout, v.transpose(-1, -2));
  const at::Tensor mean = (dp * probabilities).sum(-1, /*keepdim=*/true);
  const at::Tensor ds = probabilities * (dp - mean) * (1.0 / std::sqrt(double(q.size(-1))));
  const at::Tensor dq = at::matmul(ds, k), dk = at::matmul(ds.transpose(-1, -2), q);
  return at::cat({join_heads(dq), join_heads(dk), join_heads(dv)}, -1).to(saved.qkv.scalar_type());
}

}  // namespace pyra::kernels
