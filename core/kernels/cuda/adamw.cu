// AdamW: gradients added up, their norm, and the step, over the arena of all trained tensors.
//
// A thread owns every (blocks * threads)-th element of the arena and finds its tensor by halving. The first kernel adds
// an element's partial sums in the order of chunks and leaves each block's sum of squares; the second adds those up,
// every block for itself and in the same order, so that all agree on whether the step is good without another launch.
// Bytes moved an element: 4 a chunk, then 4 (gradient) + 3 * 8 (master, moments) + its copy.
#include "kernels/cuda/adamw.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "kernels/cuda/device.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kThreads = 256, kMaxBlocks = 1024;

/// The tensor that element i of the arena belongs to, or null between two of them.
__device__ __forceinline__ const Segment* segment_of(const AdamWCall& call, int64_t i) {
  int low = 0, high = call.segment_count;  // the last whose offset is at most i
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (call.segments[middle].offset <= i)
      low = middle;
    else
      high = middle;
  }
  const Segment* segment = call.segments + low;
  return i - segment->offset < segment->count ? segment : nullptr;
}

/// The block's sum, in every thread, in one fixed order.
__device__ __forceinline__ double block_sum(double x, double* shared) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  double total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) total += shared[w];
  return total;
}

__global__ void __launch_bounds__(kThreads) gradient_kernel(const AdamWCall call) {
  __shared__ double shared[kThreads / kWarp];
  double squares = 0;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < call.total; i += int64_t(gridDim.x) * kThreads) {
    const Segment* segment = segment_of(call, i);
    if (!segment || !segment->partial) continue;
    const float* partial = segment->partial + (i - segment->offset);
    float sum = 0;
#pragma unroll 8
    for (int k = 0; k < segment->chunks; ++k) sum = __fadd_rn(sum, partial[k * segment->chunk_stride]);
    call.gradients[i] = sum;
    squares += double(sum) * double(sum);
  }
  const double total = block_sum(squares, shared);
  if (threadIdx.x == 0) call.norms[blockIdx.x] = total;
}

__device__ __forceinline__ void write_copy(const Segment& segment, int64_t i, float value) {
  const int64_t at = i / segment.columns * segment.copy_stride + i % segment.columns;
  const float scaled = __fmul_rn(value, segment.copy_scale);
  if (segment.copy_dtype == DType::fp32)
    static_cast<float*>(segment.copy)[at] = scaled;
  else if (segment.copy_dtype == DType::bf16)
    static_cast<__nv_bfloat16*>(segment.copy)[at] = from_float<__nv_bfloat16>(scaled);
  else
    static_cast<__half*>(segment.copy)[at] = from_float<__half>(scaled);
}

/// Block 0's first thread keeps the books. The others read only stopped_at of it, and to them it makes no difference
/// whether it is written already: they see for themselves that this step is not good.
__device__ __forceinline__ void keep_books(const AdamWCall& call, bool good, double norm) {
  StepStatus& status = *call.status;
  status.last_loss = status.pending_loss;
  status.last_norm = norm;
  if (good) {
    status.loss_sum += status.pending_loss * call.images;
    status.correct += status.pending_correct;
    status.images += call.images;
  } else if (status.stopped_at < 0) {
    status.stopped_loss = status.pending_loss;
    status.stopped_norm = norm;
    status.stopped_at = int64_t(call.inputs->step);
  }
}

__global__ void __launch_bounds__(kThreads) step_kernel(const AdamWCall call) {
  __shared__ double shared[kThreads / kWarp];
  double squares = 0;
  for (int block = threadIdx.x; block < int(gridDim.x); block += kThreads) squares += call.norms[block];
  const double norm = sqrt(block_sum(squares, shared));
  const bool good = call.status->stopped_at < 0 && isfinite(norm) && isfinite(call.status->pending_loss);
  if (blockIdx.x == 0 && threadIdx.x == 0) keep_books(call, good, norm);
  if (!good) return;
  const StepInputs s = *call.inputs;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < call.total; i += int64_t(gridDim.x) * kThreads) {
    const Segment* segment = segment_of(call, i);
    if (!segment || !segment->partial) continue;
    const int group = segment->merge_group ? 1 : 0;
    const float g = call.gradients[i];
    const float m = call.first[i] + s.rate1 * (g - call.first[i]);
    const float v = s.beta2 * call.second[i] + s.rate2 * g * g;
    call.first[i] = m;
    call.second[i] = v;
    const float value = s.keep[group] * call.values[i] - s.rate[group] * m / (sqrtf(v) * s.unbias2 + s.eps);
    call.values[i] = value;
    if (segment->copy) write_copy(*segment, i - segment->offset, value);
  }
}

}  // namespace

StepInputs step_inputs(uint64_t step, double lr, double merge_lr, const AdamWConstants& c) {
  const double t = double(step) + 1, unbias1 = 1 - std::pow(c.beta1, t);
  return {.step = step,
          .keep = {float(1 - lr * c.weight_decay), float(1 - merge_lr * c.weight_decay)},
          .rate = {float(lr / unbias1), float(merge_lr / unbias1)},
          .rate1 = float(1 - c.beta1),
          .beta2 = float(c.beta2),
          .rate2 = float(1 - c.beta2),
          .unbias2 = float(1 / std::sqrt(1 - std::pow(c.beta2, t))),
          .eps = float(c.eps)};
}

int adamw_blocks(int64_t total) {
  return int(std::clamp<int64_t>((total + kThreads - 1) / kThreads, 1, kMaxBlocks));
}

void adamw(const AdamWCall& call, cudaStream_t stream) {
  if (!call.segments || call.segment_count < 1 || !call.values || !call.first || !call.second || !call.gradients ||
      call.total < 1 || !call.inputs || !call.status || !call.norms || call.images < 1)
    fail(ExitCode::usage, "adamw: a pointer is null, or there is nothing to train");
  const int blocks = adamw_blocks(call.total);
  gradient_kernel<<<blocks, kThreads, 0, stream>>>(call);
  PYRA_CUDA_LAUNCHED();
  step_kernel<<<blocks, kThreads, 0, stream>>>(call);
  PYRA_CUDA_LAUNCHED();
}

}  // namespace pyra::kernels::cuda
