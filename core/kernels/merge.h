// Applies a merge plan: gather, PYRA's gate, reduction and new sizes in one pass over the tokens, forward
// and backward. The formulas stand in sdk/merge_plan.h.
//
// kernels/ lies below sdk/, so the plan arrives here as its parts; nn/ takes it apart.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace pyra::kernels {

struct MergeGate {
  at::Tensor a, b, weight, bias;  ///< [R,1], [1,C], [C], [C] fp32
  double eps = 1e-5;
};

struct MergeArguments {
  at::Tensor keep;       ///< [B,K] int64
  at::Tensor src;        ///< [B,R] int64
  at::Tensor dst;        ///< [B,R] int64, positions in keep
  bool weighted = true;  ///< by size; false: plain mean
  std::optional<MergeGate> gate{};
  at::Tensor src_weight{};      ///< [B,R] fp32 or undefined; differentiable
  at::Tensor src_size_scale{};  ///< [B,R] fp32 or undefined
};

struct Merged {
  at::Tensor tokens;  ///< [B,K,C] fp32
  at::Tensor sizes;   ///< [B,K] fp32, no gradient
};

/// Why a plan is wrong, with image and position: index out of range, a token named twice, mismatching shapes,
/// protected tokens moved. "" when it is right. Reads the index tensors once.
[[nodiscard]] std::string check_merge(const MergeArguments& arguments, int64_t batch, int64_t tokens,
                                      int64_t expected_kept, int64_t protected_tokens);

/// x [B,N,C] fp32, sizes [B,N] fp32, positive. With u = size (weighted) or 1 (mean) and w = src_weight or 1:
///   out[k]  = (u x[keep[k]] + sum of w S'[i] over src i with dst[i] = k) / (u + sum of w u[src[i]])
///   S'[i]   = u x[src[i]], or what the gate makes of it (sdk/merge_plan.h), with D' = u x[keep[dst[i]]]
///   size[k] = size[keep[k]] + sum of size[src[i]] * max(0, src_size_scale[i]), so that sizes stay positive
/// A token that receives none is copied bit for bit. Differentiable once in x, src_weight and the gate's four tensors;
/// the backward pass is written by hand. Nothing is recorded where none of them requires gradients.
/// Arguments must have passed check_merge, which checks what C does not matter for; the gate's C is checked here.
/// Sums run in the order of the plan and gradients of shared tensors are summed image by image, so results do not
/// depend on the number of threads, nor an image's on the others. Parallel over images.
/// Bytes moved: forward K + R tokens read, K written; backward K read, N written, and with a gate or src_weight
/// gradients the K + R tokens read again.
[[nodiscard]] Merged merge_tokens(const at::Tensor& x, const at::Tensor& sizes, const MergeArguments& arguments);

/// The same by plain ATen operations in x's dtype, differentiable by autograd: the truth that tests compare with.
[[nodiscard]] Merged merge_tokens_reference(const at::Tensor& x, const at::Tensor& sizes,
                                            const MergeArguments& arguments);

}  // namespace pyra::kernels
