// LoRA's thin products on tensor cores: h = drop(x) Aᵀ; d_x += mask (d_h A); d_A = d_hᵀ drop(x); d_B = scale dyᵀ h.
//
// A lane always reads 8 neighbouring channels of a row, 16 bytes, which one Philox block decides about, and the roles
// of rows and columns in the tensor cores' layout are dealt out so that what it reads is what it multiplies and what it
// writes: nothing passes through shared memory on the way.
// lora_down: a block owns 16 rows; its 4 warps take every fourth 32 channels, and their sums are added in order. A is
// read by every block, from cache. Moves x once.
// The gradients: a block owns a chunk of rows and 64 channels; its 4 warps take every fourth 16 rows, and their sums
// are added in order. Moves x and d_x (or dy) once for every kPassRanks ranks.
#include "kernels/cuda/lora.h"

#include <algorithm>

#include "kernels/cuda/lora_gradient.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kWarps = 4, kTileRows = 16;
constexpr int kDownChannels = 32;  // of a warp at a time
constexpr int kMaxChunks = 48, kChunkStep = kWarps * kTileRows;
/// Ranks that a launch of the gradients takes: more would not fit the registers.
template <class T>
constexpr int kPassRanks = sizeof(T) == 4 ? 16 : 32;

/// Columns first..first+columns-1 of h; the ranks among them, in tiles of 8, are at most 8 kTiles.
template <class T, int kTiles>
__global__ void __launch_bounds__(kWarps* kWarp) down_kernel(const LoraDownCall call, int first, int columns) {
  __shared__ float parts[kWarps][kTileRows][kTiles * 8];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int begin = int(blockIdx.x) * kTileRows;
  const DropoutMask mask(call.dropout);
  const int row[2] = {min(begin + g, call.rows - 1), min(begin + g + 8, call.rows - 1)};
  float sums[kTiles][4] = {};
#pragma unroll(kTiles == 1 ? 2 : 1)
  for (int base = warp * kDownChannels; base < call.in; base += kWarps * kDownChannels) {
    // A lane beyond the row reads its start, against zeros of A.
    const int c = base + t * kVector < call.in ? base + t * kVector : 0;
    const bool inside = base + t * kVector < call.in;
    Words<T, kVector> x[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      x[i] = Words<T, kVector>::read(static_cast<const T*>(call.x) + row[i] * call.x_stride + c);
    if (mask.drops()) {
#pragma unroll
      for (int i = 0; i < 2; ++i) mask.dropped(uint64_t(row[i]) * uint64_t(call.in) + uint64_t(c)).apply(x[i]);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int rank = first + tile * 8 + g;
      float a[kVector] = {};
      if (inside && rank < call.rank) load_floats<float, kVector>(call.a + int64_t(rank) * call.in + c, a);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        constexpr int kHalf = Words<T, 4>::kCount;
        Words<T, 4> lower, upper;
#pragma unroll
        for (int w = 0; w < kHalf; ++w) {
          lower.word[w] = x[0].word[s * kHalf + w];
          upper.word[w] = x[1].word[s * kHalf + w];
        }
        const auto b = Parts<T>::of(a, s * 4);
        multiply_add_16(sums[tile], lower, upper, b.high);
        if constexpr (sizeof(T) == 2) multiply_add_16(sums[tile], lower, upper, b.low);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[warp][g + i / 2 * 8][tile * 8 + 2 * t + i % 2] = sums[tile][i];
  }
  __syncthreads();
  const int vectors = columns / kVector;
  for (int i = threadIdx.x; i < kTileRows * vectors; i += kWarps * kWarp) {
    const int own = i / vectors, column = i % vectors * kVector;
    if (begin + own >= call.rows) break;
    float values[kVector] = {};
    if (column < kTiles * 8) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) values[e] = __fadd_rn(values[e], parts[w][own][column + e]);
      }
#pragma unroll
      for (int e = 0; e < kVector; ++e) values[e] = __fmul_rn(values[e], mask.scale());
    }
    const auto words = Words<T, kVector>::of(values, 0);
    const int64_t r = begin + own;
    words.write(static_cast<T*>(call.h) + r * call.h_stride + first + column);
    if (call.h_copy) words.write(static_cast<T*>(call.h_copy) + r * call.padded + first + column);
  }
}

/// On a multiprocessor; one more, and registers spill.
template <class T, int kGroups, bool kPasses>
constexpr int kBlocksWanted = kGroups > 1 || (kPasses && sizeof(T) == 4) ? 2
                              : kPasses                                  ? 3
                                                                         : 4;

template <class T, int kGroups, bool kPasses>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocksWanted<T, kGroups, kPasses>) gradient_kernel(const Job<T> job) {
  constexpr int kSums = kGroups * 32, kPitch = kWarp + 1;  // an odd pitch: the last step reads across
  __shared__ float shared[kSums * kPitch];
  __shared__ Factors<T, kPasses ? kGroups : 0> factors;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int slab = int(blockIdx.x) * kTileChannels, c = slab + g * kVector < job.channels ? slab + g * kVector : 0;
  const bool owns = slab + g * kVector < job.channels;
  const int begin = int(blockIdx.y) * job.rows_of_chunk, end = min(job.rows, begin + job.rows_of_chunk);
  const DropoutMask mask(job.dropout);
  if constexpr (kPasses) {
    factors.fill(job, slab, warp, lane);
    __syncthreads();
  }
  float sums[kGroups][8][4] = {};
#pragma unroll 1
  for (int base = begin + warp * kTileRows; base < end; base += kWarps * kTileRows) {
    // Rows beyond the last repeat it, against zeros of h.
    Words<T, kVector> m[4], d_x[4];
    int64_t row[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      row[q] = min(base + t * 4 + q, end - 1);
      m[q] = Words<T, kVector>::read(job.m + row[q] * job.m_stride + c);
      if constexpr (kPasses) d_x[q] = Words<T, kVector>::read(job.d_x + row[q] * job.d_x_stride + c);
    }
    Words<T, 4> h[kGroups][2];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int from = base + thin_row(g, i), rank = group * 16 + t * 4;
        h[group][i] = {};
        if (from < end && rank < job.ranks) h[group][i] = Words<T, 4>::read(job.h + from * job.h_stride + rank);
      }
    }
    if (job.norm_weight) {
      float weight[kVector], bias[kVector], values[kVector];
      load_floats<float, kVector>(job.norm_weight + c, weight);
      load_floats<float, kVector>(job.norm_bias + c, bias);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) values[e] = __fmaf_rn(m[q].value(e), weight[e], bias[e]);
        m[q] = Words<T, kVector>::of(values, 0);
      }
    }
    Dropped dropped[4] = {};
    if (mask.drops()) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        dropped[q] = mask.dropped(uint64_t(row[q]) * uint64_t(job.channels) + uint64_t(c));
        dropped[q].apply(m[q]);
      }
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      Words<T, 4> lower, upper;
      turn(job, h[group], group, base, end, lane, lower, upper);
#pragma unroll
      for (int j = 0; j < 8; ++j) multiply_add_16(sums[group][j], lower, upper, column_of(m, j));
    }
    if constexpr (kPasses) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float through[4][4] = {};
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
          for (int pair = 0; pair < 4; ++pair) factors.multiply(through[pair], group, pair, h[group][i], lane);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int q = 2 * i + n;
          float values[kVector];
#pragma unroll
          for (int e = 0; e < kVector; ++e)
            values[e] = __fmaf_rn(mask.scale(), dropped[q].apply(through[e / 2][e % 2 * 2 + n], e), d_x[q].value(e));
          if (owns && base + t * 4 + q < end)
            Words<T, kVector>::of(values, 0).write(job.d_x + row[q] * job.d_x_stride + c);
        }
      }
    }
  }
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) {
    if (warp == w) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        float& place = shared[i * kPitch + lane];
        const float own = sums[i / 32][i / 4 % 8][i % 4];
        place = w == 0 ? own : __fadd_rn(place, own);
      }
    }
    __syncthreads();
  }
  const float scale = __fmul_rn(job.scale, mask.scale());
  const int channels = min(kTileChannels, job.channels - slab);
  float* partial = job.partial + int64_t(blockIdx.y) * job.chunk_stride + slab * job.channel_step;
  for (int i = threadIdx.x; i < channels * job.ranks; i += kWarps * kWarp) {
    const bool along = job.channel_step == 1;  // neighbours write neighbours
    const int channel = along ? i % channels : i / job.ranks, rank = along ? i / channels : i % job.ranks;
    const int sum = (rank / 16 * 8 + channel % 8) * 4 + rank / 2 % 2 * 2 + channel / 8 % 2;
    const int holder = (rank % 16 / 4 * 2 + rank % 2) * 4 + channel / 16;
    partial[channel * job.channel_step + rank * job.rank_step] = __fmul_rn(scale, shared[sum * kPitch + holder]);
  }
}

template <class T, int kGroups>
void launch(const Job<T>& job, cudaStream_t stream) {
  const dim3 grid(unsigned((job.channels + kTileChannels - 1) / kTileChannels), unsigned(lora_chunks(job.rows)));
  if (job.d_x)
    gradient_kernel<T, kGroups, true><<<grid, kWarps * kWarp, 0, stream>>>(job);
  else
    gradient_kernel<T, kGroups, false><<<grid, kWarps * kWarp, 0, stream>>>(job);
}

[[nodiscard]] int rows_of_chunk(int rows) {
  const int least = (rows + kMaxChunks - 1) / kMaxChunks;
  return std::max(1, (least + kChunkStep - 1) / kChunkStep) * kChunkStep;
}

/// `job` for all of `ranks`, a launch for as many as it takes.
template <class T>
void launch_passes(const Job<T>& job, int ranks, cudaStream_t stream) {
  for (int first = 0; first < ranks; first += kPassRanks<T>) {
    Job<T> pass = job;
    pass.rows_of_chunk = rows_of_chunk(job.rows);
    pass.ranks = std::min(kPassRanks<T>, ranks - first);
    pass.h += first;
    pass.partial += first * job.rank_step;
    if (job.a) pass.a += int64_t(first) * job.channels;
    if constexpr (kPassRanks < T >> 16) {
      if (pass.ranks > 16) {
        launch<T, 2>(pass, stream);
        continue;
      }
    }
    launch<T, 1>(pass, stream);
  }
}

void check_shape(const char* who, int rows, int channels, int rank, DType compute) {
  check_dtype(who, compute);
  if (rows < 1 || channels < kVector || channels % kVector != 0 || rank < 1 || rank > kMaxLoraRank)
    fail(ExitCode::usage, who, ": ", rows, " rows of ", channels, " channels, rank ", rank, "; expected a multiple of ",
         kVector, " channels and a rank from 1 to ", kMaxLoraRank);
}

void check_rows(const char* who, const char* name, const void* pointer, int64_t stride, int columns, DType compute) {
  check_pointer(who, name, pointer);
  if (stride < columns || stride * int64_t(size_of(compute)) % 16 != 0)
    fail(ExitCode::usage, who, ": rows of ", name, " are ", stride, " elements apart; expected at least ", columns,
         " and a multiple of 16 bytes");
}

[[nodiscard]] int padded_ranks(int rank) {
  return (rank + kVector - 1) / kVector * kVector;
}

}  // namespace

int lora_chunks(int rows) {
  const int of_chunk = rows_of_chunk(rows);
  return std::max(1, (rows + of_chunk - 1) / of_chunk);
}

void lora_down(const LoraDownCall& call, cudaStream_t stream) {
  constexpr const char* kWho = "lora_down";
  check_shape(kWho, call.rows, call.in, call.rank, call.compute);
  check_rows(kWho, "x", call.x, call.x_stride, call.in, call.compute);
  check_rows(kWho, "h", call.h, call.h_stride, call.padded, call.compute);
  check_pointer(kWho, "a", call.a);
  if (call.h_copy) check_pointer(kWho, "h_copy", call.h_copy);
  if (call.padded % kVector != 0 || call.padded < call.rank)
    fail(ExitCode::usage, kWho, ": ", call.padded, " columns for rank ", call.rank);
  const auto blocks = unsigned((call.rows + kTileRows - 1) / kTileRows);
  with_type(call.compute, [&](auto type) {
    using T = decltype(type);
    constexpr int kRanks = 64;
    for (int first = 0; first < call.rank; first += kRanks) {
      const int ranks = std::min(kRanks, call.rank - first);
      const int columns = first + kRanks < call.rank ? kRanks : call.padded - first;
      const auto launch_tiles = [&]<int kTiles>() {
        down_kernel<T, kTiles><<<blocks, kWarps * kWarp, 0, stream>>>(call, first, columns);
      };
      if (ranks <= 8)
        launch_tiles.template operator()<1>();
      else if (ranks <= 16)
        launch_tiles.template operator()<2>();
      else if (ranks <= 32)
        launch_tiles.template operator()<4>();
      else
        launch_tiles.template operator()<8>();
    }
  });
  PYRA_CUDA_LAUNCHED();
}

void lora_backward(const LoraBackwardCall& call, cudaStream_t stream) {
  constexpr const char* kWho = "lora_backward";
  check_shape(kWho, call.rows, call.in, call.rank, call.compute);
  check_rows(kWho, "x", call.x, call.x_stride, call.in, call.compute);
  check_rows(kWho, "d_h", call.d_h, call.d_h_stride, padded_ranks(call.rank), call.compute);
  if (call.d_x) check_rows(kWho, "d_x", call.d_x, call.d_x_stride, call.in, call.compute);
  if (call.norm_weight) {
    check_pointer(kWho, "norm_weight", call.norm_weight);
    check_pointer(kWho, "norm_bias", call.norm_bias);
  }
  check_pointer(kWho, "a", call.a);
  check_pointer(kWho, "a_partial", call.a_partial);
  with_type(call.compute, [&](auto type) {
    using T = decltype(type);
    launch_passes<T>({.m = static_cast<const T*>(call.x),
                      .m_stride = call.x_stride,
                      .norm_weight = call.norm_weight,
                      .norm_bias = call.norm_bias,
                      .h = static_cast<const T*>(call.d_h),
                      .h_stride = call.d_h_stride,
                      .scale = 1,
                      .partial = call.a_partial,
                      .chunk_stride = int64_t(call.rank) * call.in,
                      .channel_step = 1,
                      .rank_step = call.in,
                      .rows = call.rows,
                      .channels = call.in,
                      .ranks = 0,
                      .rows_of_chunk = 0,
                      .a = call.a,
                      .d_x = static_cast<T*>(call.d_x),
                      .d_x_stride = call.d_x_stride,
                      .dropout = call.dropout},
                     call.rank, stream);
  });
  PYRA_CUDA_LAUNCHED();
}

void thin_gradient(const ThinGradientCall& call, cudaStream_t stream) {
  constexpr const char* kWho = "thin_gradient";
  check_shape(kWho, call.rows, call.out, call.rank, call.compute);
  check_rows(kWho, "dy", call.dy, call.dy_stride, call.out, call.compute);
  check_rows(kWho, "h", call.h, call.h_stride, padded_ranks(call.rank), call.compute);
  if (!call.b_partial) fail(ExitCode::usage, kWho, ": b_partial is null");
  with_type(call.compute, [&](auto type) {
    using T = decltype(type);
    launch_passes<T>({.m = static_cast<const T*>(call.dy),
                      .m_stride = call.dy_stride,
                      .norm_weight = nullptr,
                      .norm_bias = nullptr,
                      .h = static_cast<const T*>(call.h),
                      .h_stride = call.h_stride,
                      .scale = call.scale,
                      .partial = call.b_partial,
                      .chunk_stride = call.chunk_stride,
                      .channel_step = call.rank,
                      .rank_step = 1,
                      .rows = call.rows,
                      .channels = call.out,
                      .ranks = 0,
                      .rows_of_chunk = 0,
                      .a = nullptr,
                      .d_x = nullptr,
                      .d_x_stride = 0,
                      .dropout = {}},
                     call.rank, stream);
  });
  PYRA_CUDA_LAUNCHED();
}

}  // namespace pyra::kernels::cuda
