// The device that a thread works on.
#pragma once
#include <memory>
#include <string>

#include "kernels/cuda/gemm_cache.h"

namespace pyra::engine {

/// Makes it the calling thread's; gives it back.
int set_device(int device);
/// The user's cache of chosen matrix product algorithms, for this GPU, driver and library; null if `deterministic`,
/// where none is chosen.
[[nodiscard]] std::shared_ptr<kernels::cuda::GemmCache> gemm_cache(int device, bool deterministic);

}  // namespace pyra::engine
