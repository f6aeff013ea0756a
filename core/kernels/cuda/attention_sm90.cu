// attention.h's softmax(q kᵀ / sqrt(D) + log(size)) v on Hopper's own instructions.
//
// A block is one warpgroup and owns a head of an image, or a part of the head's tiles of 64 query rows. One thread has
// the copy engine bring K, V and a tile of Q to shared memory, swizzled as wgmma reads them, rows past the last as
// zeros; the tile's logits are one wgmma over all keys into registers, so the softmax sees whole rows and needs no
// second look; the weights, packed where they lie, are the left operand of the wgmma with V. Warp w owns rows 16w to
// 16w+15 of a tile, a quad of lanes one row and the row 8 below it. Blocks are kept small so that several are on a
// multiprocessor and one's copies run under another's arithmetic. A row's arithmetic is the same however tiles are
// shared out, and it meets no other row's numbers.
//
// Bytes moved: qkv once and out once (K and V once for each part of a head), B N 4C elements; logits none.
// Measured (H100 80GB HBM3, driver 580.159.04, 2026-11-25, graphs, bf16, sizes, 256 images of 12 heads) for 197, 157,
// 123, 93, 69, 51, 37, 27, 19 tokens, in us: 133, 95, 75, 58, 46, 31, 23, 17, 12, about 2.6 TB/s from 157 down; one
// image of 197: 4.5. Without sizes 197 take 127. The portable way: 233, 161, 109, 88, 75, 48, 38, 27, 19; 8.2.
//
// Tried, no better: a block for many heads that copies the next one's K and V under the last tile (faster for 27 and 69
// tokens, slower for the rest); fetching the next head to L2 (20 % slower for 197: what was fetched is evicted); maxima
// of half the keys while the others multiply; weights of half the keys multiplied while the others are raised (the
// compiler spills and serialises); maps that promote to 256 bytes in L2 (1 to 3 % slower).
#include <algorithm>
#include <atomic>
#include <cmath>

#include "base/error.h"
#include "kernels/cuda/attention_hopper.cuh"
#include "kernels/cuda/attention_paths.h"
#include "kernels/cuda/dependent.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kMostTokens = 256;  // whose keys a wgmma, or two, multiply at once

struct HopperJob {
  CUtensorMap all_keys, some_queries;  ///< qkv as [image, row, channel], in boxes of a head's keys and of a tile
  const float* sizes;
  void* out;
  float *class_rows, *log_sum;
  int* done;
  bool qkv_is_there;
  int tokens, heads, splits;
  float scale;  ///< of a product, to powers of two
};

/// Blocks wanted on a multiprocessor: as many as shared memory and the registers of keys/2 logits a thread allow
/// without spills (one more of the smaller ones spilled, made the compiler serialise the wgmma, and was slower).
[[maybe_unused]] constexpr int blocks_for(int keys) {
  return keys > 160 ? 3 : keys > 80 ? 4 : keys > 64 ? 5 : keys > 48 ? 6 : 7;
}

/// Bytes of a block's shared memory that has room for `Keys` keys: K, V, a tile of Q, a bias for each key, barriers.
template <int Keys>
struct HopperShape {
  static constexpr int kKeyBytes = Keys * kRowBytes, kTileBytes = kTile * kRowBytes;
  static constexpr int kBiasAt = 2 * kKeyBytes + kTileBytes, kBarriersAt = kBiasAt + Keys * 4;
  static constexpr int kShared = kBarriersAt + 3 * 8;
  static_assert(kKeyBytes % 1024 == 0);
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/// The sizes of a thread's keys, one in each kGroup, read at once so that their latencies overlap.
template <int Keys>
struct HopperSizes {
  static constexpr int kCount = (Keys + kGroup - 1) / kGroup;
  float size[kCount];

  __device__ __forceinline__ void load(const HopperJob& job, int image) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int key = i * kGroup + threadIdx.x;
      size[i] = key >= job.tokens ? 0.f : job.sizes == nullptr ? 1.f : job.sizes[size_t(image) * job.tokens + key];
    }
  }
  /// As what is added to a key's logits, in powers of two; nothing is left of keys past the last.
  __device__ __forceinline__ void store(float* bias) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int key = i * kGroup + threadIdx.x;
      if (key < Keys) bias[key] = log2f(size[i]);
    }
  }
};

/// A thread's logits, and then weights, of two rows: [2i], [2i + 1] of 4 belong to row i.
template <int Keys>
struct HopperRows {
  static constexpr int kWidth = Keys > 128 ? Keys / 2 : Keys;  ///< of one wgmma
  static constexpr int kParts = Keys / kWidth, kTiles = Keys / 8, kTilesOfPart = kWidth / 8;
  static constexpr int kSurely =  ///< keys that exist in every call, as for fewer there is a smaller shape
      Keys == 32    ? 0
      : Keys <= 96  ? Keys - 16
      : Keys <= 160 ? Keys - 32
                    : Keys - 48;
  static_assert(kWidth * kRowBytes % 1024 == 0);
  float part[kParts][kWidth / 2];
  float sum[2] = {};  ///< of the weights, inverted, after weigh()

  __device__ __forceinline__ float& at(int tile, int i) {
    return part[tile / kTilesOfPart][tile % kTilesOfPart * 4 + i];
  }

  /// q kᵀ. The rows of `queries` and `keys` are as describe() wants them.
  template <class T>
  __device__ __forceinline__ void multiply_keys(const unsigned char* queries, const unsigned char* keys) {
    const uint64_t a = describe(queries), b = describe(keys);
    open_multiplications();
#pragma unroll
    for (int p = 0; p < kParts; ++p)
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d)
        multiply_transposed<T, kWidth>(part[p], a + 2 * d, b + (p * kWidth * kRowBytes >> 4) + 2 * d, d > 0);
    await_multiplications();
#pragma unroll
    for (int p = 0; p < kParts; ++p) hold_back(part[p]);
  }

  /// Logits to weights 2^(logit - the row's highest), and their sums, inverted. The highest is sought after scale and
  /// bias or, where keys are not `Sized` and the bias only says which do not exist, before: the scale goes into the
  /// subtraction then. `log_sum`, if any, takes the logarithms of the sums, at the place of the thread's row `own` and
  /// 8 further, as far as these are less than `tokens`.
  template <bool Sized>
  __device__ __forceinline__ void weigh(const float* bias, float scale, float* log_sum, int own, int tokens) {
    float high[2][2], sums[2][2] = {};  // of even and of odd keys, so that two chains run
#pragma unroll
    for (int i = 0; i < 4; ++i) high[i / 2][i % 2] = kLowest;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const bool biased = Sized || tile >= kSurely / 8;
      float2 b = {};
      if (biased) b = *reinterpret_cast<const float2*>(bias + 8 * tile + 2 * (threadIdx.x % 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& logit = at(tile, i);
        if (biased) logit = fmaf(logit, Sized ? scale : 1.f, i % 2 == 0 ? b.x : b.y);
        high[i / 2][i % 2] = fmaxf(high[i / 2][i % 2], logit);
      }
    }
    float top[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      top[row] = fmaxf(high[row][0], high[row][1]);
      top[row] = fmaxf(top[row], __shfl_xor_sync(kAllLanes, top[row], 1));
      top[row] = fmaxf(top[row], __shfl_xor_sync(kAllLanes, top[row], 2));
      if (!Sized) top[row] *= scale;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& logit = at(tile, i);
        logit = exp2_fast(Sized ? logit - top[i / 2] : fmaf(logit, scale, -top[i / 2]));
        sums[i / 2][i % 2] += logit;
      }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float all = sums[row][0] + sums[row][1];
      all += __shfl_xor_sync(kAllLanes, all, 1);
      all += __shfl_xor_sync(kAllLanes, all, 2);
      if (log_sum != nullptr && threadIdx.x % 4 == 0 && own + 8 * row < tokens)
        log_sum[own + 8 * row] = top[row] + log2f(all);
      sum[row] = 1.f / all;
    }
  }

  /// out = weights v. The weights lie as wgmma wants its left operand.
  template <class T>
  __device__ __forceinline__ void multiply_values(float (&out)[kHeadDim / 2], const unsigned char* values) {
    uint32_t weight[Keys / 16][4];
#pragma unroll
    for (int k = 0; k < Keys / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weight[k][i] = pack_pair(T{}, at(2 * k + i / 2, i % 2 * 2), at(2 * k + i / 2, i % 2 * 2 + 1));
    const uint64_t b = describe(values);
    open_multiplications();
#pragma unroll
    for (int k = 0; k < Keys / 16; ++k) multiply<T>(out, weight[k], b + (k * 16 * kRowBytes >> 4), k > 0);
    await_multiplications();
    hold_back(out);
  }

  /// The probabilities of row 0, of lanes 0 to 3.
  __device__ __forceinline__ void store_class_row(float* class_row, int tokens) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = 8 * tile + 2 * (threadIdx.x % 4) + i;
        if (key < tokens) class_row[key] = at(tile, i) * sum[0];
      }
  }
};

/// The row at which a tile is loaded. A last tile that has rows for some warps only starts early, by as many warps'
/// rows as the block's number tells, so that every scheduler gets its share of such tiles.
__device__ __forceinline__ int start_of(int tile, int tokens) {
  const int first = tile * kTile, warps = (tokens - first + 15) / 16;
  const unsigned turn = blockIdx.x ^ blockIdx.x >> 7;  // blocks that share a multiprocessor often lie 132 apart
  const int skipped = warps >= 4 ? 0 : warps == 1 ? turn % 4 : warps == 2 ? turn % 2 * 2 : turn % 2;
  return first - 16 * skipped;
}

template <class T, int Keys, bool Sized, int Blocks>
__global__ void __launch_bounds__(kGroup, Blocks) attend_hopper(const __grid_constant__ HopperJob job) {
  using Shape = HopperShape<Keys>;
  extern __shared__ __align__(1024) unsigned char shared[];
  unsigned char *keys = shared, *values = shared + Shape::kKeyBytes, *queries = shared + 2 * Shape::kKeyBytes;
  auto* bias = reinterpret_cast<float*>(shared + Shape::kBiasAt);
  auto* keys_there = reinterpret_cast<uint64_t*>(shared + Shape::kBarriersAt);
  uint64_t *values_there = keys_there + 1, *queries_there = keys_there + 2;
  const int split = blockIdx.x % job.splits, head = blockIdx.x / job.splits % job.heads;
  const int image = blockIdx.x / job.splits / job.heads, channels = job.heads * kHeadDim;
  const int tiles = (job.tokens + kTile - 1) / kTile, warp = threadIdx.x / kWarp;

  const auto load_queries = [&](int row) {
    expect_bytes(queries_there, Shape::kTileBytes);
    copy_box(queries, &job.some_queries, head * kHeadDim, row, image, queries_there);
  };
  if (threadIdx.x == 0) {
    fetch_map(&job.all_keys);
    fetch_map(&job.some_queries);
    start_barrier(keys_there);
    start_barrier(values_there);
    start_barrier(queries_there);
    publish_barriers();
  }
  if (job.done == nullptr) admit_next();
  if (!job.qkv_is_there) await_earlier();
  if (job.done != nullptr) admit_next();  // and vouches for qkv
  HopperSizes<Keys> sizes;
  sizes.load(job, image);
  if (threadIdx.x == 0) {
    load_queries(start_of(split, job.tokens));
    expect_bytes(keys_there, Shape::kKeyBytes);
    copy_box(keys, &job.all_keys, channels + head * kHeadDim, 0, image, keys_there);
    expect_bytes(values_there, Shape::kKeyBytes);
    copy_box(values, &job.all_keys, 2 * channels + head * kHeadDim, 0, image, values_there);
  }
  sizes.store(bias);
  __syncthreads();
  await_phase(keys_there, 0);

  for (int tile = split, round = 0; tile < tiles; tile += job.splits, ++round) {
    HopperRows<Keys> rows;
    await_phase(queries_there, round);
    rows.template multiply_keys<T>(queries, keys);
    const int first = start_of(tile, job.tokens) + warp * 16;
    const bool wanted = first >= tile * kTile && first < job.tokens;
    if (tile + job.splits < tiles) {
      __syncthreads();  // no warp reads these queries any more
      if (threadIdx.x == 0) load_queries(start_of(tile + job.splits, job.tokens));
    }
    if (wanted) {
      float* log_sum = job.log_sum;
      if (log_sum != nullptr) log_sum += (size_t(image) * job.heads + head) * job.tokens;
      rows.template weigh<Sized>(bias, job.scale, log_sum, first + threadIdx.x % kWarp / 4, job.tokens);
    }
    if (first == 0 && job.class_rows != nullptr && threadIdx.x % kWarp < 4)
      rows.store_class_row(job.class_rows + (size_t(image) * job.heads + head) * job.tokens, job.tokens);
    if (round == 0) await_phase(values_there, 0);
    float out[kHeadDim / 2];
    rows.template multiply_values<T>(out, values);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 8 * half + threadIdx.x % kWarp / 4;
      T* to = static_cast<T*>(job.out) + (size_t(image) * job.tokens + row) * channels + head * kHeadDim;
      store_half(to, out, half, rows.sum[half], wanted && row < job.tokens);
    }
  }
  report_block(job.done);
}

#else

/// Stands for the kernel where the code is not for sm_90a; its bound tells the host.
template <class T, int Keys, bool Sized, int Blocks>
__global__ void __launch_bounds__(kWarp) attend_hopper(const __grid_constant__ HopperJob) {}

#endif

template <class T, int Keys, bool Sized, int Blocks = blocks_for(Keys)>
int launch_hopper(const AttentionCall& call, int processors, cudaStream_t stream) {
  if (!prepare_hopper<&attend_hopper<T, Keys, Sized, Blocks>>()) return 0;
  const int64_t heads = int64_t(call.batch) * call.heads;
  const int tiles = (call.tokens + kTile - 1) / kTile;
  const int splits = int(std::clamp<int64_t>(int64_t{Blocks} * processors / heads, 1, tiles));
  if (heads * splits > INT32_MAX) {
    fail(ExitCode::usage, "attention: ", call.batch, " images of ", call.heads,
         " heads are more than one launch takes");
  }
  const auto scale = float(1.4426950408889634 / std::sqrt(double(kHeadDim)));
  const int channels = 3 * call.heads * kHeadDim;
  const HopperJob job{map_of(call.qkv, channels, call.tokens, call.batch, Keys, call.dtype),
                      map_of(call.qkv, channels, call.tokens, call.batch, kTile, call.dtype),
                      call.sizes,
                      call.out,
                      call.class_rows,
                      call.log_sum,
                      call.done,
                      call.qkv_is_there,
                      call.tokens,
                      call.heads,
                      splits,
                      scale};
  launch_dependent<&attend_hopper<T, Keys, Sized, Blocks>>(
      {dim3(unsigned(heads * splits)), kGroup, size_t(HopperShape<Keys>::kShared)}, stream, job);
  return int(heads * splits);
}

/// With the least room for keys that is enough.
template <class T, int Keys, int... More>
int launch_least(const AttentionCall& call, int processors, cudaStream_t stream) {
  if (call.tokens <= Keys) {
    return call.sizes == nullptr ? launch_hopper<T, Keys, false>(call, processors, stream)
                                 : launch_hopper<T, Keys, true>(call, processors, stream);
  }
  if constexpr (sizeof...(More) > 0) return launch_least<T, More...>(call, processors, stream);
  return 0;
}

}  // namespace

bool attention_sm90_takes(const AttentionCall& call) {
  return call.dtype != DType::fp32 && call.head_dim == kHeadDim && call.tokens <= kMostTokens &&
         hopper_device().usable && shared_memory_limit() >= 200 << 10;
}

int attention_sm90(const AttentionCall& call, cudaStream_t stream) {
  if (!attention_sm90_takes(call)) return 0;
  const int processors = hopper_device().processors;
  if (call.dtype == DType::bf16)
    return launch_least<__nv_bfloat16, 32, 48, 64, 80, 96, 128, 160, 208, kMostTokens>(call, processors, stream);
  return launch_least<__half, 32, 48, 64, 80, 96, 128, 160, 208, kMostTokens>(call, processors, stream);
}

}  // namespace pyra::kernels::cuda
