// attention_backward.h's gradients on Hopper's own instructions, in two passes: what attention_backward_sm90.cu did
// before it had one. Kept for comparisons (PYRA_ATTN_BWD=old).
//
// A block is one warpgroup and owns a head of an image, or a part of its tiles. One thread has the copy engine bring
// the head's Q, dO, K and V to shared memory, once, swizzled as wgmma reads them, while the others make rowsum(dO ∘
// out) from global memory. Then the passes of attention_backward_terms.cuh: a tile is 64 keys, or 64 queries, whose
// logits and dO Vᵀ with `Columns` queries, or keys, are two chains of wgmma into registers; P and dS, packed where they
// lie, are the left operands of the wgmma with dO, and with Q or K. Those of one chunk and the next chunk's logits are
// issued together, so a chunk costs one wait. A tile's sums stay in registers in one order: columns ascend, whoever the
// block's companions are.
//
// Rows are kept in multiples of 16; a tile or a chunk that reaches past them reads the next operand's first rows, which
// are numbers like others, and past the last operand zeros: P and dS are 0 there, or the result is not stored.
//
// Bytes moved: qkv, out and dO once, d_qkv once, B N 8C elements (for 128 images of 197 tokens, 12 heads: 310 MB, 0.1
// ms at 3 TB/s). Work: 14 B H N² D operations where 10 would do: P and dS of a head in shared memory would leave room
// for one block on a multiprocessor instead of two.
// Measured (H100 80GB HBM3, driver 580.159.04, 2026-11-25, bf16, 128 images of 12 heads) for 197, 157, 123, 93, 69, 51,
// 37, 27, 19 tokens, in us: 270, 169, 118, 85, 76, 47, 36, 27, 21. Tried: 48 columns for 197 and 157 (288, 192), 64
// (380, 188: two rounds of four tiles), 96 (402, 179); two blocks where three fit (no difference).
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>

#include "base/error.h"
#include "kernels/cuda/attention_backward_paths.h"
#include "kernels/cuda/attention_backward_terms.cuh"
#include "kernels/cuda/attention_hopper.cuh"

namespace pyra::kernels::cuda {
namespace {
namespace two_passes {

struct BackwardJob {
  CUtensorMap qkv_rows, d_out_rows;  ///< as [image, row, channel], in boxes of `rows` rows of a head
  const float *sizes, *log_sum;
  const void *out, *d_out;
  void* d_qkv;
  int tokens, heads, splits;
  int rows;       ///< tokens, rounded up to 16
  int last_rows;  ///< that the last operand has: whole tiles and chunks
  float scale;    ///< of a product of q and k, to powers of two
  float factor;   ///< of dQ and dK: 1 / sqrt(D)
};

/// Rounded up to whole chunks.
template <int Columns>
constexpr int whole_chunks(int tokens) {
  return (tokens + Columns - 1) / Columns * Columns;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/// What the block has in shared memory: the operands' rows, and a term of every query and key. Found anew where it is
/// needed: registers are dear.
struct BackwardHead {
  const BackwardJob& job;
  unsigned char* shared;
  int columns;
  [[nodiscard]] __device__ __forceinline__ unsigned char* q() const { return shared; }
  [[nodiscard]] __device__ __forceinline__ unsigned char* d_out() const { return shared + job.rows * kRowBytes; }
  [[nodiscard]] __device__ __forceinline__ unsigned char* k() const { return shared + 2 * job.rows * kRowBytes; }
  [[nodiscard]] __device__ __forceinline__ unsigned char* v() const { return shared + 3 * job.rows * kRowBytes; }
  [[nodiscard]] __device__ __forceinline__ float* query_terms() const {
    return reinterpret_cast<float*>(v() + job.last_rows * kRowBytes);
  }
  [[nodiscard]] __device__ __forceinline__ float* key_terms() const { return query_terms() + columns; }
  [[nodiscard]] __device__ __forceinline__ float* delta() const { return query_terms() + 2 * columns; }
  [[nodiscard]] __device__ __forceinline__ uint64_t* there() const {
    return reinterpret_cast<uint64_t*>(query_terms() + 3 * columns);
  }
};

/// A tile of 64 rows over all columns, and the sums of its gradients, which lie as wgmma leaves them.
template <class T, bool kKeys, int Columns>
struct BackwardTile {
  float x_grad[kHeadDim / 2], z_grad[kHeadDim / 2];  ///< of K and V, or of Q (and none)
  float p[Columns / 2], ds[Columns / 2];             ///< q k and dO v, before they become P and dS
  float shift[2], delta[2];                          ///< of the thread's two rows

  __device__ __forceinline__ void issue_rows(uint64_t x, uint64_t z, uint64_t x_columns, uint64_t z_columns) {
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) multiply_transposed<T, Columns>(p, x + 2 * d, x_columns + 2 * d, d > 0);
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) multiply_transposed<T, Columns>(ds, z + 2 * d, z_columns + 2 * d, d > 0);
  }

  /// p and ds become P and dS, of which `weights` and `slopes` are what wgmma wants as left operands.
  __device__ __forceinline__ void weigh(const float* column_terms, const float* column_delta, float scale,
                                        uint32_t (&weights)[Columns / 16][4], uint32_t (&slopes)[Columns / 16][4]) {
#pragma unroll
    for (int tile = 0; tile < Columns / 8; ++tile) {
      const int column = 8 * tile + 2 * (threadIdx.x % 4);
      const float2 c = *reinterpret_cast<const float2*>(column_terms + column);
      float2 d = {};
      if (kKeys) d = *reinterpret_cast<const float2*>(column_delta + column);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float *one = p + 4 * tile + 2 * half, *slope = ds + 4 * tile + 2 * half;
        one[0] = exp2_fast(fmaf(one[0], scale, c.x + shift[half]));
        one[1] = exp2_fast(fmaf(one[1], scale, c.y + shift[half]));
        slope[0] = one[0] * (slope[0] - (kKeys ? d.x : delta[half]));
        slope[1] = one[1] * (slope[1] - (kKeys ? d.y : delta[half]));
        if (kKeys) weights[tile / 2][tile % 2 * 2 + half] = pack_pair(T{}, one[0], one[1]);
        slopes[tile / 2][tile % 2 * 2 + half] = pack_pair(T{}, slope[0], slope[1]);
      }
    }
  }

  /// `first` is the warp's first row of the head. Stores the gradients at `to` (K's, or Q's) and `to_values`.
  __device__ __forceinline__ void run(const BackwardJob& job, const BackwardHead& head, int tile, T* to, T* to_values) {
    const int first = tile * kTile + threadIdx.x / kWarp * 16, own = first + threadIdx.x % kWarp / 4;
    const bool wanted = first < job.tokens;
    // Of p and ds too: registers that a product may read count as taken since the tile before.
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) x_grad[i] = z_grad[i] = 0.f;
#pragma unroll
    for (int i = 0; i < Columns / 2; ++i) p[i] = ds[i] = 0.f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = own + 8 * half;
      const bool exists = row < job.tokens;
      shift[half] = exists ? (kKeys ? head.key_terms() : head.query_terms())[row] : -INFINITY;
      delta[half] = !kKeys && exists ? head.delta()[row] : 0.f;
    }
    const uint64_t x = describe((kKeys ? head.k() : head.q()) + tile * kTile * kRowBytes);
    const uint64_t z = describe((kKeys ? head.v() : head.d_out()) + tile * kTile * kRowBytes);
    uint64_t x_columns = describe(kKeys ? head.q() : head.k()), z_columns = describe(kKeys ? head.d_out() : head.v());
    const float* column_terms = kKeys ? head.query_terms() : head.key_terms();
    open_multiplications();
    issue_rows(x, z, x_columns, z_columns);
    await_multiplications();
    hold_back(p);
    hold_back(ds);
#pragma unroll 1
    for (int column = 0; column < job.tokens; column += Columns) {
      uint32_t weights[Columns / 16][4], slopes[Columns / 16][4];
      if (wanted) {
        weigh(column_terms + column, head.delta() + column, job.scale, weights, slopes);
      } else {
#pragma unroll
        for (int i = 0; i < Columns / 4; ++i) weights[i / 4][i % 4] = slopes[i / 4][i % 4] = 0;
      }
      open_multiplications();
#pragma unroll
      for (int k = 0; k < Columns / 16; ++k) {
        multiply<T>(x_grad, slopes[k], x_columns + (k * 16 * kRowBytes >> 4), true);
        if constexpr (kKeys) multiply<T>(z_grad, weights[k], z_columns + (k * 16 * kRowBytes >> 4), true);
      }
      x_columns += Columns * kRowBytes >> 4;
      z_columns += Columns * kRowBytes >> 4;
      if (column + Columns < job.tokens) issue_rows(x, z, x_columns, z_columns);
      await_multiplications();
      hold_back(x_grad);
      if constexpr (kKeys) hold_back(z_grad);
      hold_back(p);
      hold_back(ds);
    }
    const int pitch = 3 * job.heads * kHeadDim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = own + 8 * half;
      store_half(to + size_t(row) * pitch, x_grad, half, job.factor, row < job.tokens);
      if constexpr (kKeys) store_half(to_values + size_t(row) * pitch, z_grad, half, 1.f, row < job.tokens);
    }
  }
};

template <class T, int Columns, int Blocks>
__global__ void __launch_bounds__(kGroup, Blocks) attend_backward_hopper(const __grid_constant__ BackwardJob job) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int bytes = job.rows * kRowBytes, columns = whole_chunks<Columns>(job.tokens);
  const BackwardHead operands{job, shared, columns};
  const int split = blockIdx.x % job.splits, head = blockIdx.x / job.splits % job.heads;
  const int image = blockIdx.x / job.splits / job.heads, channels = job.heads * kHeadDim, at = head * kHeadDim;

  if (threadIdx.x == 0) {
    start_barrier(operands.there());
    publish_barriers();
    expect_bytes(operands.there(), 4 * bytes);
    copy_box(operands.q(), &job.qkv_rows, at, 0, image, operands.there());
    copy_box(operands.d_out(), &job.d_out_rows, at, 0, image, operands.there());
    copy_box(operands.k(), &job.qkv_rows, channels + at, 0, image, operands.there());
    copy_box(operands.v(), &job.qkv_rows, 2 * channels + at, 0, image, operands.there());
  }
  const size_t row0 = size_t(image) * job.tokens;
  const float* sizes = job.sizes == nullptr ? nullptr : job.sizes + row0;
  const float* log_sum = job.log_sum + (size_t(image) * job.heads + head) * job.tokens;
  for (int i = threadIdx.x; i < columns; i += kGroup) {
    operands.query_terms()[i] = query_term(log_sum, i, job.tokens);
    operands.key_terms()[i] = key_term(sizes, i, job.tokens);
  }
  for (int i = bytes / 16 + threadIdx.x; i < job.last_rows * kRowBytes / 16; i += kGroup)
    reinterpret_cast<uint4*>(operands.v())[i] = make_uint4(0, 0, 0, 0);
  publish_stores();
  load_delta<T, kHeadDim>({static_cast<const T*>(job.out) + row0 * channels + at, channels},
                          {static_cast<const T*>(job.d_out) + row0 * channels + at, channels}, 0, columns, job.tokens,
                          operands.delta());
  __syncthreads();
  await_phase(operands.there(), 0);

  T* grad = static_cast<T*>(job.d_qkv) + row0 * 3 * channels + at;
  const int tiles = (job.tokens + kTile - 1) / kTile;
  for (int item = split; item < 2 * tiles; item += job.splits) {
    if (item < tiles) {
      BackwardTile<T, true, Columns> tile;
      tile.run(job, operands, item, grad + channels, grad + 2 * channels);
    } else {
      BackwardTile<T, false, Columns> tile;
      tile.run(job, operands, item - tiles, grad, nullptr);
    }
  }
}

#else

/// Stands for the kernel where the code is not for sm_90a; its bound tells the host.
template <class T, int Columns, int Blocks>
__global__ void __launch_bounds__(kWarp) attend_backward_hopper(const __grid_constant__ BackwardJob) {}

#endif

/// Whether the program holds the kernel for this device, which then may use the shared memory it needs. Asked once.
template <class T, int Columns, int Blocks>
bool prepare() {
  static std::atomic<int> known[64];  // 0: not asked, 1: ready, -1: built without sm_90a
  int device = 0;
  PYRA_CUDA(cudaGetDevice(&device));
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    const auto kernel = reinterpret_cast<const void*>(&attend_backward_hopper<T, Columns, Blocks>);
    cudaFuncAttributes attributes{};
    PYRA_CUDA(cudaFuncGetAttributes(&attributes, kernel));
    answer = attributes.maxThreadsPerBlock >= kGroup ? 1 : -1;
    if (answer > 0) {
      PYRA_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 << 10));
      PYRA_CUDA(
          cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    }
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer > 0;
}

/// Into how many blocks a head's tiles are cut: what takes the fewest rounds of `room` blocks, counted in heads. Each
/// part brings the operands anew, so a finer cut must be worth a tenth.
int splits_for(int64_t heads, int64_t room, int most) {
  int best = 1;
  double least = 0;
  for (int splits = 1; splits <= most; ++splits) {
    const double rounds = double((heads * splits + room - 1) / room) / splits;
    if (splits > 1 && rounds > 0.9 * least) continue;
    best = splits;
    least = rounds;
  }
  return best;
}

template <class T, int Columns, int Blocks>
bool launch(const AttentionBackwardCall& call, int processors, cudaStream_t stream) {
  if (!prepare<T, Columns, Blocks>()) return false;
  const int64_t heads = int64_t(call.batch) * call.heads;
  const int tiles = (call.tokens + kTile - 1) / kTile, channels = call.heads * kHeadDim;
  const int splits = splits_for(heads, Blocks * int64_t(processors), 2 * tiles);
  if (heads * splits > INT32_MAX) {
    fail(ExitCode::usage, "attention_backward: ", call.batch, " images of ", call.heads,
         " heads are more than one launch takes");
  }
  const int rows = (call.tokens + 15) / 16 * 16, columns = whole_chunks<Columns>(call.tokens);
  const int last_rows = std::max(columns, tiles * kTile);
  const size_t shared = size_t(3 * rows + last_rows) * kRowBytes + size_t(columns) * 3 * sizeof(float) + 8;
  const double factor = 1.0 / std::sqrt(double(kHeadDim));
  const BackwardJob job{map_of(call.qkv, 3 * channels, call.tokens, call.batch, rows, call.dtype),
                        map_of(call.d_out, channels, call.tokens, call.batch, rows, call.dtype),
                        call.sizes,
                        call.log_sum,
                        call.out,
                        call.d_out,
                        call.d_qkv,
                        call.tokens,
                        call.heads,
                        splits,
                        rows,
                        last_rows,
                        float(1.4426950408889634 * factor),
                        float(factor)};
  attend_backward_hopper<T, Columns, Blocks><<<unsigned(heads * splits), kGroup, shared, stream>>>(job);
  PYRA_CUDA_LAUNCHED();
  return true;
}

/// With chunks of 32 or 48 columns, whichever take less time of the tensor cores: one of 48 takes 7/5 of one of 32's.
/// From 129 tokens on shared memory allows two blocks only, and registers are there for 80.
template <class T>
bool launch_type(const AttentionBackwardCall& call, int processors, cudaStream_t stream) {
  constexpr int kBlocks = 3, kMostOfThree = 128;
  if (call.tokens > kMostOfThree) return launch<T, 80, 2>(call, processors, stream);
  const bool narrow = 5 * (whole_chunks<32>(call.tokens) / 32) < 7 * (whole_chunks<48>(call.tokens) / 48);
  return narrow ? launch<T, 32, kBlocks>(call, processors, stream) : launch<T, 48, kBlocks>(call, processors, stream);
}

}  // namespace two_passes
}  // namespace
}  // namespace pyra::kernels::cuda
