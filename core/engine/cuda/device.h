// The device that a thread works on.
#pragma once
#include <functional>
#include <memory>
#include <string>

#include "kernels/cuda/gemm_cache.h"

namespace pyra::engine {

/// Makes it the calling thread's; gives it back.
int set_device(int device);
/// The user's cache of chosen matrix product algorithms, for this GPU, driver and library; null if `deterministic`,
/// where none is chosen.
[[nodiscard]] std::shared_ptr<kernels::cuda::GemmCache> gemm_cache(int device, bool deterministic);
/// Before memory is taken for `images` images: Error(device) that says what would fit where the device has too little.
/// `what` takes it ("a step of 32 images"); `bytes_for`: what a number of images needs; `option`: how that number is
/// asked for ("train.batch=").
void check_room(const std::string& what, int images, const std::function<size_t(int)>& bytes_for, const char* option);

}  // namespace pyra::engine
