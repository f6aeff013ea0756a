// The way back through a merge and its gate, on the device. The formulas are kernels/merge_image.h's; no gradient flows
// through the choice, the sizes, src_weight or src_size_scale.
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

struct MergeBackwardCall {
  // What the forward pass was given, see MergeCall.
  const float* x = nullptr;      ///< [B,N,C] the stream before the merge
  const float* sizes = nullptr;  ///< [B,N] or null: all one
  const int32_t *keep = nullptr, *src = nullptr, *dst = nullptr;
  bool weighted = true;
  const float *gate_a = nullptr, *gate_b = nullptr, *gate_weight = nullptr,
              *gate_bias = nullptr;  ///< gate_a null: none
  float gate_eps = 1e-5f;
  int batch = 0, tokens = 0, kept = 0, merged = 0, channels = 0;

  const float* d_out = nullptr;         ///< [B,K,C] gradient of the stream after the merge
  float* d_x = nullptr;                 ///< [B,N,C], written entirely: a dropped token gets 0
  void* d_branch = nullptr;             ///< [B,N,C] of `compute` = d_x * branch_scale[image], or null
  const float* branch_scale = nullptr;  ///< [B], or null: 1
  DType compute = DType::bf16;
  /// [B] rows of R + 3C, or null: each image's gradients of gate_a, gate_b, gate_weight and gate_bias, in this order.
  float* d_gate = nullptr;
};

/// In fp32, in the order of the plan: bit-equal from run to run, and an image's d_x whoever its companions are.
/// channels: a multiple of 8 up to 1536. Throws Error(usage) where a plan does not fit into shared memory. No
/// allocation, no synchronisation.
void merge_backward(const MergeBackwardCall& call, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
