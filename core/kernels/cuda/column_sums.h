// Sums over rows: the gradients of biases and of norms' weights, as partial sums in one fixed order.
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

struct ColumnSumsCall {
  const void* d = nullptr;  ///< rows of `dtype`, d_stride elements apart
  int64_t d_stride = 0;
  DType dtype = DType::bf16;
  const void* factor = nullptr;  ///< [rows,C] of `dtype`, or null: d * factor is summed
  int rows = 0, channels = 0;    ///< channels: a multiple of 8
  float* partial = nullptr;      ///< [column_sum_chunks(rows),C]
};
/// Into how many chunks rows are cut: a function of their number alone.
[[nodiscard]] int column_sum_chunks(int rows);
/// partial[k][c] = sum of d[i][c] (* factor[i][c]) over the rows of chunk k, in their order; in fp32.
void column_sums(const ColumnSumsCall& call, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
