// The device that a thread works on.
#pragma once
#include <string>

namespace pyra::engine {

/// Makes it the calling thread's; gives it back.
int set_device(int device);
/// What a chosen matrix product algorithm holds for: GPU, driver, library.
[[nodiscard]] std::string gemm_version(int device);

}  // namespace pyra::engine
