// From images to the residual stream: patches of normalised images, and tokens from embedded patches.
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

struct PatchCall {
  const void* images = nullptr;  ///< [B,S,S,3] uint8 (as loaded), or [B,3,S,S] fp32 (normalised already) if `is_float`
  bool is_float = false;
  int batch = 0, side = 0, patch = 0;
  float mean[3]{}, std[3]{};  ///< of values in [0,1]; uint8 only
  void* out = nullptr;  ///< [B*P,3*patch*patch] of `compute`: channel, row, column within the patch (Conv2d's order)
  DType compute = DType::bf16;
};
/// (v/255 - mean)/std, channel by channel, cut into patches: the left operand of the patch embedding's GEMM.
void extract_patches(const PatchCall& call, cudaStream_t stream);

struct AssembleCall {
  const void* embedded = nullptr;                       ///< [B*P,C] of `compute`: patch embedding, bias added
  const float *prefix = nullptr, *positions = nullptr;  ///< [protected,C], [P,C]
  int batch = 0, patches = 0, protected_tokens = 1, channels = 0;
  void* x = nullptr;  ///< [B,protected+P,C] of `residual`
  const float *norm_weight = nullptr, *norm_bias = nullptr;
  float norm_eps = 1e-6f;
  void* y = nullptr;  ///< LayerNorm of x, of `compute`
  DType residual = DType::fp32, compute = DType::bf16;
  int *tallies = nullptr, tally_count = 0;  ///< of the pass: set to 0
};
/// Prefix tokens and embedded patches with their positions, and the first block's LayerNorm, in one pass.
void assemble_tokens(const AssembleCall& call, cudaStream_t stream);

/// y = GELU(y), exact (erf), in place: for where the matrix product's epilogue has only the tanh form.
void gelu_erf(void* y, DType dtype, int64_t count, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
