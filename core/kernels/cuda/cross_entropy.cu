// Mean cross-entropy, a teacher's divergence, their gradient, and the gradients of the head's weight and bias.
//
// cross_entropy: one block; a warp owns every 32nd image, so the mean is added up in one fixed order. The logits of a
// step are a few hundred KB at most.
// head_gradient: a thread owns an element of the weight (or of the bias) and goes over the images; neighbours read
// neighbouring features.
#include "kernels/cuda/cross_entropy.h"

#include "base/error.h"
#include "kernels/cuda/device.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kWarps = 32, kHeadThreads = 256;

struct Best {
  float value;
  int index;
  __device__ __forceinline__ void take(float other, int at) {
    if (other > value || (other == value && at < index)) value = other, index = at;
  }
};

/// The largest of a row, and where; by a warp.
__device__ __forceinline__ Best best_of(const float* row, int classes, int lane) {
  Best best{-INFINITY, classes};
  for (int k = lane; k < classes; k += kWarp) best.take(row[k], k);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    best.take(__shfl_xor_sync(kAllLanes, best.value, offset), __shfl_xor_sync(kAllLanes, best.index, offset));
  return best;
}

/// log sum exp((row - best) scale)
__device__ __forceinline__ float log_sum(const float* row, float best, float scale, int classes, int lane) {
  float sum = 0;
  for (int k = lane; k < classes; k += kWarp) sum += expf((row[k] - best) * scale);
  return logf(warp_sum(sum));
}

/// weight T² KL(teacher, student) of an image; its gradient is added to what `gradient` holds, times `share`.
__device__ __forceinline__ double teach(const CrossEntropyCall& call, const float* logits, const float* teacher,
                                        float best, float share, float* gradient, int lane) {
  const float soft = 1.0f / call.temperature, top = best_of(teacher, call.classes, lane).value;
  const float own = log_sum(logits, best, soft, call.classes, lane),
              given = log_sum(teacher, top, soft, call.classes, lane);
  float divergence = 0;
  for (int k = lane; k < call.classes; k += kWarp) {
    const float p = (logits[k] - best) * soft - own, q = (teacher[k] - top) * soft - given, wanted = expf(q);
    divergence = fmaf(wanted, q - p, divergence);
    gradient[k] += call.teacher_weight * call.temperature * share * (expf(p) - wanted);
  }
  return double(call.teacher_weight * call.temperature * call.temperature) * double(warp_sum(divergence));
}

__global__ void __launch_bounds__(kWarps* kWarp) loss_kernel(const CrossEntropyCall call) {
  __shared__ double losses[kWarps];
  __shared__ int hits[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const float share = 1.0f / float(call.batch), from_labels = call.teacher ? 1.0f - call.teacher_weight : 1.0f;
  double loss = 0;
  int correct = 0;
  for (int image = warp; image < call.batch; image += kWarps) {
    const float* logits = call.logits + int64_t(image) * call.classes;
    float* gradient = call.d_logits + int64_t(image) * call.classes;
    const int label = call.labels[image];
    const Best best = best_of(logits, call.classes, lane);
    const float total = log_sum(logits, best.value, 1.0f, call.classes, lane);
    for (int k = lane; k < call.classes; k += kWarp)
      gradient[k] = (expf(logits[k] - best.value - total) - (k == label ? 1.0f : 0.0f)) * share * from_labels;
    loss += double(from_labels) * (double(total) - (double(logits[label]) - double(best.value)));
    if (call.teacher)
      loss += teach(call, logits, call.teacher + int64_t(image) * call.classes, best.value, share, gradient, lane);
    correct += best.index == label ? 1 : 0;
  }
  if (lane == 0) losses[warp] = loss, hits[warp] = correct;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  int64_t right = 0;
  for (int w = 0; w < kWarps; ++w) total += losses[w], right += hits[w];
  call.status->pending_loss = total / call.batch;
  call.status->pending_correct = right;
}

__global__ void __launch_bounds__(kHeadThreads) head_kernel(const HeadGradientCall call) {
  const int c = int(blockIdx.x) * kHeadThreads + int(threadIdx.x), k = blockIdx.y;
  if (c > call.channels) return;
  const bool bias = c == call.channels;
  if (bias ? !call.d_bias : !call.d_weight) return;
  float sum = 0;
#pragma unroll 4
  for (int image = 0; image < call.batch; ++image) {
    const float d = call.d_logits[int64_t(image) * call.classes + k];
    sum = bias ? __fadd_rn(sum, d) : __fmaf_rn(d, call.features[int64_t(image) * call.channels + c], sum);
  }
  if (bias)
    call.d_bias[k] = sum;
  else
    call.d_weight[int64_t(k) * call.channels + c] = sum;
}

}  // namespace

void cross_entropy(const CrossEntropyCall& call, cudaStream_t stream) {
  if (!call.logits || !call.labels || !call.d_logits || !call.status || call.batch < 1 || call.classes < 1)
    fail(ExitCode::usage, "cross_entropy: ", call.batch, " images, ", call.classes, " classes, or a pointer is null");
  if (call.teacher && !(call.teacher_weight >= 0 && call.teacher_weight <= 1 && call.temperature > 0))
    fail(ExitCode::usage, "cross_entropy: a teacher's weight of ", call.teacher_weight, " at a temperature of ",
         call.temperature);
  loss_kernel<<<1, kWarps * kWarp, 0, stream>>>(call);
  PYRA_CUDA_LAUNCHED();
}

void head_gradient(const HeadGradientCall& call, cudaStream_t stream) {
  if (!call.d_logits || !call.features || call.batch < 1 || call.classes < 1 || call.classes > 65535 ||
      call.channels < 1)
    fail(ExitCode::usage, "head_gradient: [", call.batch, ",", call.classes, "] and [", call.batch, ",", call.channels,
         "], or a pointer is null");
  const dim3 grid(unsigned(call.channels / kHeadThreads + 1), unsigned(call.classes));
  head_kernel<<<grid, kHeadThreads, 0, stream>>>(call);
  PYRA_CUDA_LAUNCHED();
}

}  // namespace pyra::kernels::cuda
