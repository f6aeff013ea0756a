// partial[k][c] = sum over the rows of chunk k of d[i][c], or of d[i][c] factor[i][c].
//
// A block owns a chunk of rows and 8 kColumns channels; kRows threads go down each group of 8 channels, every kRows-th
// row each, and their sums are added in order at the end. Moves d (and factor) once.
#include "kernels/cuda/column_sums.h"

#include <algorithm>

#include "base/error.h"
#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kVector = 8, kColumns = 16, kRows = 16;  // a block of 256 threads
constexpr int kMaxChunks = 64, kRowsOfChunk = 64;

template <class T>
__global__ void __launch_bounds__(kColumns* kRows) sum_kernel(const ColumnSumsCall call, int rows_of_chunk) {
  __shared__ float sums[kRows][kColumns * kVector];
  const int column = threadIdx.x % kColumns, line = threadIdx.x / kColumns;
  const int c = (int(blockIdx.x) * kColumns + column) * kVector;
  const int begin = int(blockIdx.y) * rows_of_chunk, end = min(call.rows, begin + rows_of_chunk);
  float sum[kVector] = {};
  if (c < call.channels) {
    const T* d = static_cast<const T*>(call.d) + c;
    const T* factor = call.factor ? static_cast<const T*>(call.factor) + c : nullptr;
#pragma unroll 4
    for (int row = begin + line; row < end; row += kRows) {
      const auto value = Words<T, kVector>::read(d + row * call.d_stride);
      if (factor) {
        const auto by = Words<T, kVector>::read(factor + int64_t(row) * call.channels);
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum[e] = __fmaf_rn(value.value(e), by.value(e), sum[e]);
      } else {
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum[e] = __fadd_rn(sum[e], value.value(e));
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kVector; ++e) sums[line][column * kVector + e] = sum[e];
  __syncthreads();
  const int own = threadIdx.x;
  if (own >= kColumns * kVector) return;
  const int channel = int(blockIdx.x) * kColumns * kVector + own;
  if (channel >= call.channels) return;
  float total = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) total = __fadd_rn(total, sums[r][own]);
  call.partial[int64_t(blockIdx.y) * call.channels + channel] = total;
}

[[nodiscard]] int rows_of_chunk(int rows) {
  const int chunks = column_sum_chunks(rows);
  return (rows + chunks - 1) / chunks;
}

}  // namespace

int column_sum_chunks(int rows) {
  return std::clamp((rows + kRowsOfChunk - 1) / kRowsOfChunk, 1, kMaxChunks);
}

void column_sums(const ColumnSumsCall& call, cudaStream_t stream) {
  constexpr const char* kWho = "column_sums";
  check_dtype(kWho, call.dtype);
  if (call.rows < 1 || call.channels < kVector || call.channels % kVector != 0 || call.d_stride < call.channels ||
      call.d_stride * int64_t(size_of(call.dtype)) % 16 != 0)
    fail(ExitCode::usage, kWho, ": ", call.rows, " rows of ", call.channels, " channels, ", call.d_stride, " apart");
  check_pointer(kWho, "d", call.d);
  check_pointer(kWho, "partial", call.partial);
  if (call.factor) check_pointer(kWho, "factor", call.factor);
  const dim3 grid(unsigned((call.channels + kColumns * kVector - 1) / (kColumns * kVector)),
                  unsigned(column_sum_chunks(call.rows)));
  with_type(call.dtype, [&](auto type) {
    sum_kernel<decltype(type)><<<grid, kColumns * kRows, 0, stream>>>(call, rows_of_chunk(call.rows));
  });
  PYRA_CUDA_LAUNCHED();
}

}  // namespace pyra::kernels::cuda
