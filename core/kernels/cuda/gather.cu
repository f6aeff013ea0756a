// out[i] = rows[order[i]]: the images of a training step, picked from the decoded set.
//
// A block owns a piece of kPiece units of one row; a thread copies kUnroll of them, its loads in flight together. Moves
// every byte in and out once.
#include "kernels/cuda/gather.h"

#include "base/error.h"
#include "kernels/cuda/device.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 4, kPiece = kThreads * kUnroll;

template <class Unit>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const Unit* rows, int64_t units, const int32_t* order, Unit* out) {
  const int64_t first = int64_t(blockIdx.x) * kPiece + threadIdx.x;
  const Unit* from = rows + int64_t(order[blockIdx.y]) * units;
  Unit* to = out + int64_t(blockIdx.y) * units;
  Unit unit[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    if (first + u * kThreads < units) unit[u] = from[first + u * kThreads];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    if (first + u * kThreads < units) to[first + u * kThreads] = unit[u];
}

template <class Unit>
void launch(const void* rows, int64_t row_bytes, const int32_t* order, int count, void* out, cudaStream_t stream) {
  const int64_t units = row_bytes / int64_t(sizeof(Unit));
  const dim3 grid(unsigned((units + kPiece - 1) / kPiece), unsigned(count));
  gather_kernel<Unit>
      <<<grid, kThreads, 0, stream>>>(static_cast<const Unit*>(rows), units, order, static_cast<Unit*>(out));
}

}  // namespace

void gather_rows(const void* rows, int64_t row_bytes, const int32_t* order, int count, void* out, cudaStream_t stream) {
  if (row_bytes < 1 || count < 0 || count > 65535)
    fail(ExitCode::usage, "gather_rows: ", count, " rows of ", row_bytes, " bytes; expected up to 65535 of at least 1");
  if (count == 0) return;
  if (!rows || !order || !out) fail(ExitCode::usage, "gather_rows: a pointer is null");
  const auto address = reinterpret_cast<uintptr_t>(rows) | reinterpret_cast<uintptr_t>(out);
  if (row_bytes % 16 == 0 && address % 16 == 0)
    launch<uint4>(rows, row_bytes, order, count, out, stream);
  else
    launch<uint8_t>(rows, row_bytes, order, count, out, stream);
  PYRA_CUDA_LAUNCHED();
}

}  // namespace pyra::kernels::cuda
