// attention_backward.h's gradients on Hopper's own instructions: which kernel of attention_backward_one_pass.cuh takes
// a call, and its launch.
//
// Up to 64 tokens OneTile, with room for 32, 48 or 64; up to 208 Panels, of as many warpgroups as there are 64 keys.
//
// Bounds for 128 images of 12 heads of 197 tokens: 0.1 ms of memory at 3 TB/s; 10500 cycles a head of the tensor cores
// (of which S and dP take 5400: chunks of 32 queries are bound by the reading of the left operand) and as many of all
// else beside them, 0.1 ms. Tried and lost: two passes, of keys and of queries, with seven products and one warpgroup a
// block, which took 270, 169, 118, 85, 76, 47, 36, 27, 21 us for 197, 157, 123, 93, 69, 51, 37, 27, 19 tokens on an
// H100; whole steps of ViT-B with it and with this (H200, images/s, 128 a step): dense 5 947 and 6 122, PYRA high 14
// 995 and 15 334.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "base/error.h"
#include "kernels/cuda/attention_backward_one_pass.cuh"
#include "kernels/cuda/attention_backward_paths.h"

namespace pyra::kernels::cuda {
namespace {

constexpr int kMostTokens = 208;          ///< whose operands and dS fit a multiprocessor's shared memory
constexpr int kSharedMemory = 227 << 10;  ///< that a block may have

BackwardJob job_of(const AttentionBackwardCall& call, int rows) {
  const int64_t heads = int64_t(call.batch) * call.heads;
  if (heads > INT32_MAX) {
    fail(ExitCode::usage, "attention_backward: ", call.batch, " images of ", call.heads,
         " heads are more than one launch takes");
  }
  const int channels = call.heads * kHeadDim;
  const double factor = 1.0 / std::sqrt(double(kHeadDim));
  return {map_of(call.qkv, 3 * channels, call.tokens, call.batch, rows, call.dtype),
          map_of(call.d_out, channels, call.tokens, call.batch, rows, call.dtype),
          call.sizes,
          call.log_sum,
          call.out,
          call.d_out,
          call.d_qkv,
          call.tokens,
          call.heads,
          int(heads),
          rows,
          float(1.4426950408889634 * factor),
          float(factor)};
}

template <class T, int Keys>
bool launch_tile(const AttentionBackwardCall& call, cudaStream_t stream) {
  if (!prepare_hopper<&attend_backward_tile<T, Keys>>()) return false;
  const BackwardJob job = job_of(call, Keys);
  attend_backward_tile<T, Keys><<<unsigned(job.all_heads), kGroup, OneTileShape<Keys>::kShared, stream>>>(job);
  PYRA_CUDA_LAUNCHED();
  return true;
}

template <class T, int Groups>
bool launch_panels(const AttentionBackwardCall& call, int processors, cudaStream_t stream) {
  if (!prepare_hopper<&attend_backward_panels<T, Groups>>()) return false;
  const BackwardJob job = job_of(call, round_up(call.tokens, 16));
  const int terms = 3 * int(sizeof(float)) * round_up(call.tokens, kChunk) + 2 * int(sizeof(uint64_t));
  const int beyond = (Groups * kTile - job.rows) * kRowBytes;  // what the last tile reads past the last panel
  const int shared = (4 + Groups) * job.rows * kRowBytes + std::max(terms, beyond);
  const int blocks = std::min(job.all_heads, blocks_of(Groups) * processors);
  attend_backward_panels<T, Groups><<<unsigned(blocks), Groups * kGroup, size_t(shared), stream>>>(job);
  PYRA_CUDA_LAUNCHED();
  return true;
}

template <class T>
bool launch_type(const AttentionBackwardCall& call, int processors, cudaStream_t stream) {
  if (call.tokens <= 32) return launch_tile<T, 32>(call, stream);
  if (call.tokens <= 48) return launch_tile<T, 48>(call, stream);
  if (call.tokens <= 64) return launch_tile<T, 64>(call, stream);
  if (call.tokens <= 2 * kTile) return launch_panels<T, 2>(call, processors, stream);
  if (call.tokens <= 3 * kTile) return launch_panels<T, 3>(call, processors, stream);
  return launch_panels<T, 4>(call, processors, stream);
}

}  // namespace

bool attention_backward_sm90(const AttentionBackwardCall& call, cudaStream_t stream) {
  if (call.dtype == DType::fp32 || call.head_dim != kHeadDim || call.tokens > kMostTokens) return false;
  const HopperDevice device = hopper_device();
  if (!device.usable || shared_memory_limit() < size_t{kSharedMemory}) return false;
  return call.dtype == DType::bf16 ? launch_type<__nv_bfloat16>(call, device.processors, stream)
                                   : launch_type<__half>(call, device.processors, stream);
}

}  // namespace pyra::kernels::cuda
