// AdamW over all trained tensors at once, on the device (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with
// PyTorch's order of operations). The formulas are train/adamw.h's.
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

/// A trained tensor. Masters, moments and gradients of all stand in arenas of floats, at the same place in each.
struct Segment {
  int64_t offset = 0, count = 0;
  /// Its gradient is the sum over chunks, in order, of partial[chunk * chunk_stride + i].
  const float* partial = nullptr;
  int chunks = 1;
  int64_t chunk_stride = 0;
  /// Where the forward pass reads it: element i, times copy_scale, goes to copy[i / columns * copy_stride + i %
  /// columns]. Null: it reads the master.
  void* copy = nullptr;
  DType copy_dtype = DType::bf16;
  int columns = 1;
  int64_t copy_stride = 1;
  float copy_scale = 1;
  bool merge_group = false;
};

/// What changes from step to step.
struct StepInputs {
  uint64_t step = 0;  ///< from 0
  float keep[2]{};    ///< 1 - lr * weight_decay; of the common group and of the merger's
  float rate[2]{};    ///< lr / (1 - beta1^t)
  float rate1 = 0;    ///< 1 - beta1
  float beta2 = 0, rate2 = 0;
  float unbias2 = 0;  ///< 1 / sqrt(1 - beta2^t)
  float eps = 0;
};
struct AdamWConstants {
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 1e-4;
};
[[nodiscard]] StepInputs step_inputs(uint64_t step, double lr, double merge_lr, const AdamWConstants& constants);

/// What became of the steps. The sums go on from step to step until the host clears them.
struct StepStatus {
  double pending_loss = 0;      ///< cross_entropy's: mean loss of the step under way
  int64_t pending_correct = 0;  ///< likewise
  double loss_sum = 0;          ///< over images of steps that were good
  int64_t correct = 0, images = 0;
  double last_loss = 0, last_norm = 0;
  int64_t stopped_at =
      -1;  ///< the first step whose loss or gradient is not finite: it and all later ones change nothing
  double stopped_loss = 0, stopped_norm = 0;
};

struct AdamWCall {
  const Segment* segments = nullptr;  ///< on the device, by ascending offset
  int segment_count = 0;
  float *values = nullptr, *first = nullptr, *second = nullptr, *gradients = nullptr;  ///< [total]
  int64_t total = 0;
  const StepInputs* inputs = nullptr;  ///< on the device
  StepStatus* status = nullptr;        ///< on the device
  double* norms = nullptr;             ///< [adamw_blocks(total)]
  int images = 0;                      ///< of the step
};
/// Adds up the gradients, looks whether all is finite, and takes the step. Two launches, whatever the tensors.
void adamw(const AdamWCall& call, cudaStream_t stream);
[[nodiscard]] int adamw_blocks(int64_t total);

}  // namespace pyra::kernels::cuda
