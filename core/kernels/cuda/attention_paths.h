// Attention's ways for one device only, which attention() asks before it goes the way that is open to all.
#pragma once
#include "kernels/cuda/attention.h"

namespace pyra::kernels::cuda {

/// Whether Hopper's way (compute capability 9.0 exactly) takes a call: 2-byte types, heads of 64 channels, up to 256
/// tokens; it depends on these and the device alone, never on the batch. A device that PYRA_CUDA_SHARED_MEMORY makes
/// stand for a smaller one counts as that smaller one.
[[nodiscard]] bool attention_sm90_takes(const AttentionCall& call);

/// The call, which has been checked, that way: how many blocks do it, or 0 and nothing done where the way does not take
/// it or the program does not hold the kernel for this device.
[[nodiscard]] int attention_sm90(const AttentionCall& call, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
