// A batch put together on the device from a set of images that lives there.
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

/// out[i] = rows[order[i]], byte for byte, for i < count; a row has `row_bytes`. Orders must be within the set. 16
/// bytes at a time where row_bytes is a multiple of 16. No allocation, no synchronisation.
void gather_rows(const void* rows, int64_t row_bytes, const int32_t* order, int count, void* out, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
