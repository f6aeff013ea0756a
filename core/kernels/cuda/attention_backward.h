// The gradient of attention on the device: of softmax(q kᵀ / sqrt(D) + log(size_key)) v in qkv.
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

struct AttentionBackwardCall {
  const void* qkv = nullptr;       ///< [B,N,3C] of `dtype`, what attention() was given; 16-byte aligned
  const float* sizes = nullptr;    ///< [B,N] fp32, positive, or null, the same; no gradient flows to them
  const void* out = nullptr;       ///< [B,N,C] of `dtype`, what attention() gave; 16-byte aligned
  const float* log_sum = nullptr;  ///< [B,H,N] fp32, what attention() left in its log_sum
  const void* d_out = nullptr;     ///< [B,N,C] of `dtype`, the gradient of out; 16-byte aligned
  void* d_qkv = nullptr;           ///< [B,N,3C] of `dtype`, written entirely; 16-byte aligned, overlaps nothing above
  int batch = 0, tokens = 0, heads = 0, head_dim = 0;
  DType dtype = DType::bf16;  ///< fp32 is true fp32 throughout; bf16 and fp16 round probabilities and the logits'
                              ///< gradients to `dtype` and multiply on tensor cores; sums are fp32
};

/// With P the probabilities and dO the gradient of out: dV = Pᵀ dO, dS = P ∘ (dO Vᵀ - rowsum(dO ∘ out)),
/// dQ = dS K / sqrt(D), dK = dSᵀ Q / sqrt(D). P is made anew from qkv and log_sum. head_dim: a multiple of 16 from 16
/// to 128; tokens up to 1024. Bit-equal from run to run, and an image's result is bit-equal whoever its companions are.
/// No workspace, no allocation, no synchronisation. fp16: a caller that scales its loss keeps dS (at most 2 |dO| |V|)
/// within the type's range. Throws Error(device) where the launch fails, Error(usage) for shapes outside these.
void attention_backward(const AttentionBackwardCall& call, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
