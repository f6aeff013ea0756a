// LoRA's thin products on the device (arXiv 2106.09685): y = x Wᵀ + b + scale (drop(x) Aᵀ) Bᵀ.
//
// x stands in rows of `in` + `padded` columns; the columns behind hold h = drop(x) Aᵀ, and those behind the frozen
// weight hold scale B. So the frozen matrix product adds the term, and its way back gives d_h beside d_x. What is left
// is here: h, what flows back through A, and the gradients of A and B.
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

constexpr int kMaxLoraRank = 256;

/// Dropout as kernels/linear.h's, its domain made from a step that only the device knows.
struct Dropout {
  uint32_t threshold = 0;  ///< of 65536; 0: none
  float scale = 1;         ///< of what is kept
  uint64_t seed = 0;
  const uint64_t* step = nullptr;  ///< on the device; not read where nothing is dropped
  uint64_t sites_per_step = 0, site = 0;
};

struct LoraDownCall {
  const void* x = nullptr;  ///< [rows,in] of `compute`, x_stride elements apart
  int64_t x_stride = 0;
  const float* a = nullptr;  ///< [rank,in]
  void* h = nullptr;         ///< [rows,padded] of `compute`, h_stride elements apart: rank columns, then zeros
  int64_t h_stride = 0;
  void* h_copy = nullptr;  ///< [rows,padded] of `compute`, dense, or null
  int padded = 0;          ///< a multiple of 8, at least rank
  int rows = 0, in = 0, rank = 0;
  Dropout dropout{};
  DType compute = DType::bf16;
};
/// Sums in fp32 in one fixed order. in: a multiple of 8.
void lora_down(const LoraDownCall& call, cudaStream_t stream);

struct LoraBackwardCall {
  const void* x = nullptr;  ///< [rows,in] of `compute`: the layer's input, or, with norm_weight, what a norm left of it
  int64_t x_stride = 0;
  const float *norm_weight = nullptr, *norm_bias = nullptr;  ///< [in], or null: the input is x weight + bias, rounded
  const void* d_h = nullptr;                                 ///< [rows,rank…] of `compute`, d_h_stride elements apart
  int64_t d_h_stride = 0;
  const float* a = nullptr;  ///< [rank,in]
  void* d_x = nullptr;       ///< [rows,in] of `compute`, added to; null: nothing below trains
  int64_t d_x_stride = 0;
  float* a_partial = nullptr;  ///< [lora_chunks(rows), rank*in]: d_hᵀ drop(x)
  int rows = 0, in = 0, rank = 0;
  Dropout dropout{};
  DType compute = DType::bf16;
};
/// d_x += mask * (d_h A) and A's gradient, in one pass over x and d_x for every 32 ranks (fp32: 16).
void lora_backward(const LoraBackwardCall& call, cudaStream_t stream);

struct ThinGradientCall {
  const void* dy = nullptr;  ///< [rows,out] of `compute`, dy_stride elements apart
  int64_t dy_stride = 0;
  const void* h = nullptr;  ///< [rows,padded] of `compute`, h_stride elements apart
  int64_t h_stride = 0;
  float scale = 1;
  float* b_partial = nullptr;  ///< [lora_chunks(rows)] of [out,rank], chunk_stride apart: scale * dyᵀ h
  int64_t chunk_stride = 0;
  int rows = 0, out = 0, rank = 0;
  DType compute = DType::bf16;
};
/// B's gradient, in one pass over dy for every 32 ranks (fp32: 16).
void thin_gradient(const ThinGradientCall& call, cudaStream_t stream);

/// Into how many chunks rows are cut, whose sums whoever wants the gradient adds in order: a function of rows alone.
[[nodiscard]] int lora_chunks(int rows);

}  // namespace pyra::kernels::cuda
