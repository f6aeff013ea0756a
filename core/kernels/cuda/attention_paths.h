// Attention's ways for one device only, which attention() asks before it goes the way that is open to all.
#pragma once
#include "kernels/cuda/attention.h"

namespace pyra::kernels::cuda {

/// Hopper's way (compute capability 9.0 exactly): 2-byte types, heads of 64 channels, up to 256 tokens. False where it
/// does not take a call, which depends on these and the device alone, never on the batch. A device that
/// PYRA_CUDA_SHARED_MEMORY makes stand for a smaller one counts as that smaller one. The call has been checked.
[[nodiscard]] bool attention_sm90(const AttentionCall& call, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
