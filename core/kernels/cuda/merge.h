// Applies a merge plan on the device and the LayerNorm that follows it, in one pass over the tokens. The formulas are
// kernels/merge.h's and sdk/merge_plan.h's.
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

struct MergeCall {
  const void* x = nullptr;                ///< [B,N,C] of `residual`
  const float* sizes = nullptr;           ///< [B,N] or null: all one
  const int32_t* keep = nullptr;          ///< [B,K]
  const int32_t* src = nullptr;           ///< [B,R]
  const int32_t* dst = nullptr;           ///< [B,R] positions in keep
  const float* src_weight = nullptr;      ///< [B,R] or null
  const float* src_size_scale = nullptr;  ///< [B,R] or null
  bool weighted = true;                   ///< by size; false: plain mean
  /// PYRA's gate; gate_a null: none. [R], [C], [C], [C].
  const float *gate_a = nullptr, *gate_b = nullptr, *gate_weight = nullptr, *gate_bias = nullptr;
  float gate_eps = 1e-5f;
  int batch = 0, tokens = 0, kept = 0, merged = 0, channels = 0;
  DType residual = DType::fp32, compute = DType::bf16;
  void* x_out = nullptr;       ///< [B,K,C] of `residual`; not x
  float* sizes_out = nullptr;  ///< [B,K]
  /// y [B,K,C] of `compute` = LayerNorm(x_out) with these; statistics of the fp32 sums, not of what x_out rounds them
  /// to.
  const float *norm_weight = nullptr, *norm_bias = nullptr;
  float norm_eps = 1e-6f;
  void* y = nullptr;
  /// For the way back, both or neither: [B,K,C] of `compute` = (x_out - mean) / deviation, and [B,K] 1 / deviation.
  void* normalised = nullptr;
  float* inverse_deviation = nullptr;
  Tally plan_there = {};  ///< keep, src and dst are written once this is whole; none: with all that is in front
};

/// Everything is summed in fp32 in the order of the plan, so results are bit-equal from run to run and whatever the
/// companions. channels: a multiple of 8 up to 4096. Indices must have been made by match or rank, or checked. A token
/// that receives none is copied bit for bit. Bytes moved: K + R tokens read (R again with a gate), K written twice.
/// No allocation, no synchronisation.
void merge_tokens(const MergeCall& call, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
