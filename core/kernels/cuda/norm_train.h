// LayerNorm in training, on the device, with the residual addition before it: forward, backward, and of the rows that a
// head reads. The stream and its gradient are fp32; branches, norms' outputs and their gradients are of `compute`.
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

struct AddNormCall {
  float* x = nullptr;                   ///< [rows,C] the stream, updated in place where there is a branch
  const void* branch = nullptr;         ///< [rows,C] of `compute`, or null
  const float* branch_scale = nullptr;  ///< [images] drop-path's factor, or null: 1
  int rows_per_image = 1;
  const float *weight = nullptr, *bias = nullptr;  ///< [C]
  float eps = 1e-6f;
  void* normalised = nullptr;          ///< [rows,C] of `compute`: (x - mean) / deviation
  float* inverse_deviation = nullptr;  ///< [rows]
  void* y = nullptr;                   ///< of `compute`, or null: only the addition is done
  int64_t y_stride = 0;                ///< elements from row to row: more than C leaves room behind
  int rows = 0, channels = 0;
  DType compute = DType::bf16;
};
/// x += scale * branch; y = normalised * weight + bias; in one pass. A warp a row. channels: a multiple of 8 up to
/// 4096.
void add_norm(const AddNormCall& call, cudaStream_t stream);

struct NormBackwardCall {
  const void* d_y = nullptr;  ///< of `compute`, rows d_y_stride elements apart
  int64_t d_y_stride = 0;
  const void* normalised = nullptr;  ///< [rows,C] of `compute`, as add_norm left it
  const float* inverse_deviation = nullptr;
  const float* weight = nullptr;        ///< [C]
  float* d_x = nullptr;                 ///< [rows,C] the stream's gradient, added to
  void* d_branch = nullptr;             ///< [rows,C] of `compute` = the new d_x * scale, or null
  const float* branch_scale = nullptr;  ///< [images] of the branch that was added before this norm, or null: 1
  int rows_per_image = 1;
  int rows = 0, channels = 0;
  DType compute = DType::bf16;
};
/// d_x += (g - mean(g) - normalised * mean(g * normalised)) / deviation with g = d_y * weight; in one pass.
void norm_backward(const NormBackwardCall& call, cudaStream_t stream);

struct ScaleRowsCall {
  const float* d_x = nullptr;           ///< [rows,C]
  const float* branch_scale = nullptr;  ///< [images], or null: 1
  int rows_per_image = 1;
  int rows = 0, channels = 0;
  void* out = nullptr;  ///< [rows,C] of `compute`
  DType compute = DType::bf16;
};
/// out = d_x * scale, rounded: the gradient of the branch that was added last.
void scale_rows(const ScaleRowsCall& call, cudaStream_t stream);

struct NormRowsCall {
  const float* x = nullptr;  ///< rows x_stride elements apart
  int64_t x_stride = 0;
  const float *weight = nullptr, *bias = nullptr;
  float eps = 1e-6f;
  float* normalised = nullptr;         ///< [rows,C]
  float* inverse_deviation = nullptr;  ///< [rows]
  float* y = nullptr;                  ///< [rows,C]
  int rows = 0, channels = 0;
};
/// The norm before the head, in fp32.
void norm_rows(const NormRowsCall& call, cudaStream_t stream);

struct NormRowsBackwardCall {
  const float *d_y = nullptr, *normalised = nullptr, *inverse_deviation = nullptr, *weight = nullptr;
  int batch = 0, tokens = 0, channels = 0;
  int first = 0;         ///< the token whose row was normalised; pooled: the first of those whose mean was
  bool pooled = false;   ///< the mean of tokens first .. tokens-1 was normalised, not one token
  float* d_x = nullptr;  ///< [batch,tokens,C], written entirely
};
/// The gradient of the stream behind norm_rows: zero but where the head reads.
void norm_rows_backward(const NormRowsBackwardCall& call, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
