// Attention on the device: softmax(q kᵀ / sqrt(D) + log(size_key)) v. The contract is kernels/attention.h's.
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

struct AttentionCall {
  const void* qkv = nullptr;     ///< [B,N,3C] of `dtype`: q, k, v side by side, each H heads of D; 16-byte aligned
  const float* sizes = nullptr;  ///< [B,N] fp32, positive, or null: log(size) of a key is added to its logits
  void* out = nullptr;           ///< [B,N,C] of `dtype`, heads side by side
  float* class_rows = nullptr;   ///< [B,H,N] fp32 or null: the class row's (query 0's) probabilities, head by head
  float* log_sum = nullptr;  ///< [B,H,N] fp32 or null: log2 of a query's sum of 2^(q k log2(e) / sqrt(D) + log2(size)),
                             ///< so that a probability is 2^(that exponent - log_sum): what backward starts from
  int* done = nullptr;       ///< a Tally's count or null: one more for every block whose part of out is written
  bool qkv_is_there = false;  ///< for matching with a tally is in front in the stream: it need not be waited for
  int batch = 0, tokens = 0, heads = 0, head_dim = 0;
  DType dtype = DType::bf16;  ///< fp32 is true fp32 throughout; bf16 and fp16 multiply on tensor cores, sums are fp32
};

/// Whether attention() goes a way that heeds done and qkv_is_there; others wait for all that is in front.
[[nodiscard]] bool attention_overlaps(const AttentionCall& call);

/// head_dim: a multiple of 16 from 16 to 128; tokens up to 1024 (K and V of a head go through shared memory in tiles
/// where they do not fit). Softmax in fp32. An image's result is bit-equal whoever its companions are. No allocation,
/// no synchronisation. Throws Error(device) where the launch fails, Error(usage) for shapes outside these.
/// Returns how many blocks add to done: 0 where that is null, or the way taken does not heed it.
int attention(const AttentionCall& call, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
