// A linear layer's way for one device only, which LinearRunner asks before it goes cuBLASLt's.
#pragma once
#include "kernels/cuda/linear.h"

namespace pyra::kernels::cuda {

/// How linear_sm90() cuts a product. Sums of a row's `splits` pieces are added in their order, so the cut decides the
/// last bits of a result, and the rows beside a row do not, but for the cut that their number asks for.
struct SmallLinearCut {
  int rows = 0;    ///< of x, in a block: 8, 16, 32, 48, 64 or 80
  int splits = 0;  ///< blocks (a cluster) that share the sums
};

/// Hopper's way (compute capability 9.0 exactly) for few rows, 160 or, where weights are few, up to 400: the cut that
/// suits the shape, or rows = 0 where it does not take it: other types than 2-byte operands, transposed or strided
/// ones, a kept activation, sizes that are not multiples of 64, more rows.
[[nodiscard]] SmallLinearCut small_linear_cut(const LinearCall& call);

/// y as LinearCall says, by small_linear_cut()'s cut or another that fits; Error(internal) for one that does not.
/// False, and nothing done, where the program does not hold the kernel for this device.
[[nodiscard]] bool linear_sm90(const LinearCall& call, SmallLinearCut cut, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
