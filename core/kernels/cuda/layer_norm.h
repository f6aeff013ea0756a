// LayerNorm on the device, of whole streams and of the rows a head reads. The contract is kernels/layer_norm.h's.
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

struct LayerNormCall {
  const void* x = nullptr;  ///< rows of `residual`, `row_stride` elements apart
  int64_t row_stride = 0;   ///< channels for a dense [rows,C]
  int rows = 0, channels = 0;
  const float *weight = nullptr, *bias = nullptr;  ///< [C]
  float eps = 1e-6f;
  void* y = nullptr;  ///< [rows,C] of `compute`, dense
  DType residual = DType::fp32, compute = DType::bf16;
};

/// A warp a row, statistics in fp32 from registers (mean first, then squared deviations). channels: a multiple of 8 up
/// to 4096.
void layer_norm(const LayerNormCall& call, cudaStream_t stream);
/// Throws Error(usage) for a call that layer_norm() would not take.
void check_layer_norm(const LayerNormCall& call);

/// out [B,C] fp32 = mean over the tokens from `first` on, unweighted: MAE's pooling.
void mean_of_tokens(const void* x, DType residual, int batch, int tokens, int first, int channels, float* out,
                    cudaStream_t stream);

}  // namespace pyra::kernels::cuda
