// y = act(x Wᵀ + b), or residual + x Wᵀ + b, for few rows: Hopper's way.
//
// With few rows a layer is bound by its weights' way from memory and by latencies, not by arithmetic. A block is two
// warpgroups and owns 64 output features of some rows of x, over a piece of the sum; the blocks of a cluster own the
// pieces. All that a block needs fits its shared memory, so there is no pipeline: the copy engine brings the weights
// before the kernel in front has ended (dependent.cuh), and x after. wgmma's 64 rows are features and its N columns
// rows of x, as few as 8, so few rows waste no arithmetic. Each block leaves its sums [row][feature] in shared memory,
// and then adds those of the whole cluster, in order, for its share of rows, and finishes them.
//
// Bytes moved: W once for every tile of rows (from memory the first time), x out / 64 times from L2, y and residual
// once. Work: 2 rows in out operations.
// Measured (H200, driver 580.159.04, 2026-11-28, a graph of 48 products one after another, each on weights that L2 no
// longer holds, bf16, us; the fastest of cuBLASLt in brackets) for 8, 27, 51, 93, 157 rows:
//   768 to 2304: 2.6 (4.0), 3.2 (4.7), 3.6 (4.3), 4.0 (4.6), 4.8 (5.0);  768 to 768: 2.3 (3.5), 2.8 (3.9), 3.1 (3.6),
//   3.3 (3.6), 4.0 (3.7);  768 to 3072: 2.7 (5.3), 3.5 (5.7), 4.2 (5.3), 4.9 (5.3), 6.0 (6.2);  3072 to 768: 3.4 (6.9),
//   3.9 (7.2), 4.4 (7.1), 5.3 (7.2), 6.2 (7.3).
// With more rows x is read too often and cuBLASLt wins alone (197: 5.7, 4.7, 8.4, 8.7 by one warpgroup a block, 4.9,
// 4.4, 6.5, 8.3 by cuBLASLt). In a pass, where this kernel starts before the one in front has ended and cuBLASLt's do
// not, 768 to 768 gains up to 400 rows (dense, one image of 197 tokens: 0.441 ms instead of 0.463; two: 0.484 instead
// of 0.498), 768 to 2304 up to 240 (PYRA low, one image: 1 %); all four up to 240 lose 5 % of a dense pass of one
// image. Tried: one warpgroup a block instead of two (157 rows: 5.3, 4.7, 6.7, 6.7); tiles of 16, 48 and 80 rows only,
// or of 32 and 80, so that fewer kernels are in the caches (a pass of one image loses 1 and 2 %).
#include "base/error.h"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/linear_paths.h"
#include "kernels/cuda/wgmma.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kFeatures = 64;                  // of a block
constexpr int kChunkBytes = kBoxChannels * 2;  // of a row in a chunk
constexpr int kWeightBytes = kFeatures * kChunkBytes;
constexpr int kPitch = kFeatures + 4;   // floats from row to row of sums: stores meet no bank twice
constexpr int kMostChunks = 12;         // of a block
constexpr int kMostShared = 227 << 10;  // of a block, on every Hopper
constexpr int kGroups = 2, kThreads = kGroups * kGroup;

struct SmallLinearJob {
  CUtensorMap weight, x;  ///< in boxes of 64 features and of a block's rows
  const void *bias, *residual;
  void* y;
  Tally x_there;  ///< without one: when the kernel in front has ended
  int rows, out, chunks, splits;
  bool wide;  ///< bias, residual and y are fp32, else of the operands' type
  bool gelu;
};

/// A block's shared memory, in bytes: chunks of weights, chunks of x whose place the sums take, barriers.
constexpr int barriers_at(int rows, int chunks) {
  const int x = chunks * rows * kChunkBytes, sums = round_up(rows * kPitch * 4, 1024);
  return chunks * kWeightBytes + (x > sums ? x : sums);
}
constexpr int shared_bytes(int rows, int chunks) {
  return barriers_at(rows, chunks) + (kMostChunks + 1) * 8;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/// A warpgroup's part of a block's 64 features of `Rows` rows of x: half of the rows, or all, for the first alone.
template <class T, int Rows>
struct Sums {
  static constexpr int kWidth = Rows > 8 ? Rows / kGroups : Rows;  ///< of the wgmma
  float sum[kWidth / 2];

  __device__ __forceinline__ void add_chunk(const unsigned char* weight, const unsigned char* x, bool add) {
    const uint64_t a = describe(weight), b = describe(x);
    open_multiplications();
#pragma unroll
    for (int k = 0; k < kBoxChannels / 16; ++k) multiply_transposed<T, kWidth>(sum, a + 2 * k, b + 2 * k, add || k > 0);
    close_multiplications();
  }
  __device__ __forceinline__ void store(float* sums) const {
    const int feature = threadIdx.x % kGroup / kWarp * 16 + threadIdx.x % kWarp / 4, pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sums[(i / 4 * 8 + pair + i % 2) * kPitch + feature + i % 4 / 2 * 8] = sum[i];
  }
};

/// GELU's tanh form: x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x³).
__device__ __forceinline__ float gelu_tanh(float x) {
  const float twice = 1.5957691216057308f * fmaf(0.044715f * x * x, x, x);
  return __fdividef(x, 1.0f + __expf(-twice));
}

/// Four features in the type of y; zeros where there is nothing to add.
template <class T>
__device__ __forceinline__ void load_four(const SmallLinearJob& job, const void* from, int64_t at, float (&to)[4]) {
  if (from == nullptr) {
    to[0] = to[1] = to[2] = to[3] = 0;
  } else if (job.wide) {
    load_floats<float, 4>(static_cast<const float*>(from) + at, to);
  } else {
    load_floats<T, 4>(static_cast<const T*>(from) + at, to);
  }
}

/// Four features of a row as block `split` of the cluster has them.
__device__ __forceinline__ float4 sums_of(uint32_t at, int split, int splits) {
  float4 four;
  if (splits > 1) asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(split));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
               : "r"(at));
  return four;
}

/// A block's last part: the cluster's sums for its share of the tile's rows, added and finished. A thread has the same
/// four features in every row.
template <class T, int Rows>
class Reduction {
 public:
  __device__ __forceinline__ Reduction(const SmallLinearJob& job, int split, int first_row, int first_feature)
      : job_(job), at_(int64_t(first_row) * job.out + first_feature + quad() * 4) {
    const int count = min(Rows, job.rows - first_row), share = (count + job.splits - 1) / job.splits;
    row_ = split * share + int(threadIdx.x) / kQuads;
    end_ = min(count, (split + 1) * share);
    load_four<T>(job, job.bias, first_feature + quad() * 4, bias_);
  }
  /// What the thread's next row will be added to. Once this is written.
  __device__ __forceinline__ void load_residual() {
    if (row_ < end_) load_four<T>(job_, job_.residual, at_ + int64_t(row_) * job_.out, residual_);
  }
  __device__ __forceinline__ void run(const float* sums) {
    const uint32_t own = shared_address(sums);
#pragma unroll 2
    for (; row_ < end_; row_ += kThreads / kQuads, load_residual()) {
      float4 piece[kMostClustered];
#pragma unroll
      for (int s = 0; s < kMostClustered; ++s)
        if (s < job_.splits) piece[s] = sums_of(own + (row_ * kPitch + quad() * 4) * 4, s, job_.splits);
      float value[4] = {};
#pragma unroll
      for (int s = 0; s < kMostClustered; ++s)
        if (s < job_.splits)
          value[0] += piece[s].x, value[1] += piece[s].y, value[2] += piece[s].z, value[3] += piece[s].w;
      finish(value);
    }
  }

 private:
  static constexpr int kQuads = kFeatures / 4;
  __device__ __forceinline__ static int quad() {
    return int(threadIdx.x) % kQuads;
  }
  __device__ __forceinline__ void finish(float (&value)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) value[e] += bias_[e];
    if (job_.gelu) {
#pragma unroll
      for (int e = 0; e < 4; ++e) value[e] = gelu_tanh(value[e]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) value[e] += residual_[e];
    const int64_t at = at_ + int64_t(row_) * job_.out;
    if (job_.wide) {
      store_floats<float, 4>(static_cast<float*>(job_.y) + at, value);
    } else {
      store_floats<T, 4>(static_cast<T*>(job_.y) + at, value);
    }
  }

  const SmallLinearJob& job_;
  int64_t at_;
  int row_, end_;
  float bias_[4], residual_[4];
};

template <class T, int Rows>
__global__ void __launch_bounds__(kThreads) small_linear(const __grid_constant__ SmallLinearJob job) {
  extern __shared__ __align__(1024) unsigned char shared[];
  unsigned char *weight = shared, *x = shared + job.chunks * kWeightBytes;
  auto* sums = reinterpret_cast<float*>(x);
  auto* barriers = reinterpret_cast<uint64_t*>(shared + barriers_at(Rows, job.chunks));
  uint64_t *weight_there = barriers + kMostChunks, *x_there = barriers;
  const int split = int(blockIdx.x) % job.splits, first_feature = int(blockIdx.x) / job.splits * kFeatures;
  const int first_chunk = split * job.chunks, first_row = int(blockIdx.y) * Rows;

  if (threadIdx.x == 0) {
    for (int chunk = 0; chunk < job.chunks; ++chunk) start_barrier(x_there + chunk);
    start_barrier(weight_there);
    publish_barriers();
    expect_bytes(weight_there, job.chunks * kWeightBytes);
    for (int chunk = 0; chunk < job.chunks; ++chunk)
      copy_box(weight + chunk * kWeightBytes, &job.weight, (first_chunk + chunk) * kBoxChannels, first_feature, 0,
               weight_there);
    fetch_map(&job.x);
  }
  Reduction<T, Rows> reduction(job, split, first_row, first_feature);
  const bool tallied = job.x_there.count != nullptr;
  admit_next();
  if (!tallied) await_earlier();
  if (threadIdx.x == 0) {
    if (tallied) {
      await_tally(job.x_there);
      publish_memory();
    }
    for (int chunk = 0; chunk < job.chunks; ++chunk) {
      expect_bytes(x_there + chunk, Rows * kChunkBytes);
      copy_box(x + chunk * Rows * kChunkBytes, &job.x, (first_chunk + chunk) * kBoxChannels, first_row, 0,
               x_there + chunk);
    }
  }
  reduction.load_residual();
  __syncthreads();
  await_phase(weight_there, 0);
  const int group = int(threadIdx.x) / kGroup;
  const bool multiplies = group * Sums<T, Rows>::kWidth < Rows;
  Sums<T, Rows> own;
  if (multiplies) {
    const unsigned char* half = x + group * Sums<T, Rows>::kWidth * kChunkBytes;
    for (int chunk = 0; chunk < job.chunks; ++chunk) {
      await_phase(x_there + chunk, 0);
      own.add_chunk(weight + chunk * kWeightBytes, half + chunk * Rows * kChunkBytes, chunk > 0);
    }
    await_all_but<0>();
    hold_back(own.sum);
  }
  __syncthreads();  // the sums take the place of x
  if (multiplies) own.store(sums + group * Sums<T, Rows>::kWidth * kPitch);
  barrier(job.splits);
  reduction.run(sums);
  if (job.splits > 1) barrier(job.splits);  // others may still read this block's sums
}

#else

/// Stands for the kernel where the code is not for sm_90a; its bound tells the host.
template <class T, int Rows>
__global__ void __launch_bounds__(kWarp) small_linear(const __grid_constant__ SmallLinearJob) {}

#endif

/// False where the program does not hold the kernel for this device.
template <class T, int Rows>
bool launch(const LinearCall& call, int splits, cudaStream_t stream) {
  if (!prepare_hopper<&small_linear<T, Rows>>()) return false;
  const int chunks = call.in / kBoxChannels / splits, shared = shared_bytes(Rows, chunks);
  const SmallLinearJob job{map_of(call.weight, call.in, call.out, 1, kFeatures, call.compute),
                           map_of(call.x, call.in, call.rows, 1, Rows, call.compute),
                           call.bias,
                           call.residual,
                           call.y,
                           call.x_there,
                           call.rows,
                           call.out,
                           chunks,
                           splits,
                           call.result == DType::fp32,
                           call.epilogue == Epilogue::gelu_tanh};
  const dim3 grid(unsigned(call.out / kFeatures * splits), unsigned((call.rows + Rows - 1) / Rows));
  launch_dependent<&small_linear<T, Rows>>({grid, kThreads, size_t(shared), splits}, stream, job);
  return true;
}

/// Calls f(std::integral_constant) with the least of `Rows` that is at least `rows`; false where none is.
template <int Rows, int... More, class F>
bool with_rows(int rows, const F& f) {
  if (rows <= Rows) {
    f(std::integral_constant<int, Rows>{});
    return true;
  }
  if constexpr (sizeof...(More) > 0) return with_rows<More...>(rows, f);
  return false;
}
template <class F>
bool with_tile(int rows, const F& f) {
  return with_rows<8, 16, 32, 48, 64, 80>(rows, f);
}

}  // namespace

SmallLinearCut small_linear_cut(const LinearCall& call) {
  // Beyond these rows cuBLASLt's larger tiles read x less often and win; the fewer weights, the later.
  constexpr int kRowsOfTile = 64, kRowsOfTiles = 80, kBlocksWanted = 36;
  const int64_t weights = int64_t(call.in) * call.out;
  const int most = weights <= 768 * 768 ? 400 : weights <= 768 * 2304 ? 240 : 160;
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const bool plain = call.compute != DType::fp32 && (call.result == DType::fp32 || call.result == call.compute) &&
                     (call.epilogue == Epilogue::none || call.epilogue == Epilogue::gelu_tanh) && !call.transposed &&
                     !(call.residual && call.epilogue != Epilogue::none) && !call.activation && !call.x_stride &&
                     !call.weight_stride && !call.y_stride;
  const bool whole = call.in % kBoxChannels == 0 && call.out % kFeatures == 0 && aligned(call.x) &&
                     aligned(call.weight) && aligned(call.bias) && aligned(call.residual) && aligned(call.y);
  if (!plain || !whole || call.rows > most || !hopper_device().usable) return {};
  const int tiles = call.rows <= kRowsOfTile ? 1 : std::max(2, (call.rows + kRowsOfTiles - 1) / kRowsOfTiles),
            chunks = call.in / kBoxChannels;
  SmallLinearCut best;
  int rows = 0;
  with_tile((call.rows + tiles - 1) / tiles, [&](auto tile) { rows = tile; });
  // As few pieces of the sums as leave enough blocks; each costs a way through another's shared memory.
  for (const int splits : {1, 2, 4, 8, 3, 6}) {
    if (chunks % splits != 0 || chunks / splits > kMostChunks ||
        size_t(shared_bytes(rows, chunks / splits)) > shared_memory_limit())
      continue;
    if (splits > best.splits) best = {rows, splits};
    if (tiles * (call.out / kFeatures) * splits >= kBlocksWanted) break;
  }
  return best;
}

bool linear_sm90(const LinearCall& call, SmallLinearCut cut, cudaStream_t stream) {
  const int chunks = call.in / kBoxChannels, of_block = cut.splits < 1 ? 0 : chunks / cut.splits;
  if (cut.rows < 1 || cut.splits < 1 || cut.splits > kMostClustered ||
      of_block * cut.splits * kBoxChannels != call.in || call.out % kFeatures != 0 || of_block > kMostChunks ||
      shared_bytes(cut.rows, of_block) > kMostShared)
    fail(ExitCode::internal, "linear: [", call.rows, ",", call.in, "] x [", call.out, ",", call.in, "]ᵀ in tiles of ",
         cut.rows, " rows and ", cut.splits, " pieces");
  bool done = false;
  with_tile(cut.rows, [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    if (call.compute == DType::bf16) done = launch<__nv_bfloat16, kRows>(call, cut.splits, stream);
    if (call.compute == DType::fp16) done = launch<__half, kRows>(call, cut.splits, stream);
  });
  return done;
}

}  // namespace pyra::kernels::cuda
