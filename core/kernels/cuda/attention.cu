// softmax(q kᵀ / sqrt(D) + log(size)) v, head by head, as described by attention.h.
//
// Hopper has a way of its own for many shapes (attention_sm90.cu); what follows is open to all devices, types and
// shapes.
//
// A block owns some heads of one image and brings their K and V to shared memory by asynchronous copies, each row read
// once; a warp owns a tile of 16 query rows of one head (attention_mma.cuh, attention_simt.cuh) and goes over all keys
// with the softmax on line, so logits and weights live in registers. Blocks are filled by what there is: rounds of four
// or five tiles, several heads where a head has one or two tiles, a part of a head's tiles (each part bringing
// K and V anew) where heads are fewer than the device holds. None of this changes a row's arithmetic: chunks of keys
// are the same for every choice, and a row never meets another row's numbers.
//
// Bytes moved: qkv once and out once (K and V once for each part of a head), B N 4C elements; logits none.
// Work: 4 B H N² D operations, half of them on either side of the softmax.
// Measured (H100 80GB HBM3, driver 580.159.04, 2026-11-25, graphs, bf16, 256 images of 12 heads of 64, in us) for 197,
// 157, 123, 93, 69, 51, 37 tokens: 233, 161, 109, 88, 75, 48, 38, where 3 TB/s would take 103, 82, 64, 49, 36, 27, 19.
// Tried: 7 or 8 warps a block (272 for 197, 154 for 123: four or five leave room for more blocks, which copy while
// others multiply); 6 (301 for 197); 32 query rows a warp (287 for 197 with chunks of 32 keys, 321 with 16); chunks of
// 32 keys rather than 64 (451 against 382 for 64 images of 577; better only below 32 tokens, by 1 to 2).
#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>

#include "base/error.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_paths.h"
#include "kernels/cuda/attention_simt.cuh"
#include "kernels/cuda/dependent.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kMaxSlots = 4;

/// How a problem is cut. `stage` keys (a multiple of a chunk) arrive together in one of `slots` places in shared
/// memory; where places are fewer than stages they are used again, else all keys stay.
struct Plan {
  int heads = 1;   ///< of an image, in one block
  int splits = 1;  ///< blocks that share the tiles of these heads
  int warps = 1;
  int stage = 0, slots = 0;
  int rows = 0;  ///< of K, and of V, that a head has in shared memory
  size_t shared = 0;
};

struct Job {
  AttentionCall call;
  Plan plan;
  int padded;  ///< tokens, rounded up to 16
  int channels;
  float scale;  ///< of a product, to powers of two
};

constexpr int ceil_div(int n, int by) {
  return (n + by - 1) / by;
}

/// Starts the copies of a stage's keys and values, zeros for keys past the last; none for a stage past the last.
template <class Tile, class T = typename Tile::Element>
__device__ __forceinline__ void load_stage(const Job& job, const T* heads, T* keys, T* values, int stage) {
  constexpr int kPer = 16 / sizeof(T), kUnits = Tile::kDim / kPer;
  const Plan& plan = job.plan;
  const int first = stage * plan.stage, place = stage % plan.slots * plan.stage;
  const int lines = min(plan.stage, job.padded - first) * plan.heads;
#pragma unroll 1  // the copies do not wait for one another as it is, and registers are dear
  for (int i = threadIdx.x; i < lines * kUnits; i += blockDim.x) {
    const int line = i / kUnits, unit = i % kUnits * kPer;
    const int row = plan.heads == 1 ? line : line / plan.heads, head = line - row * plan.heads;
    const int key = first + row, readable = min(key, job.call.tokens - 1);
    const T* from = heads + readable * 3 * job.channels + job.channels + head * Tile::kDim + unit;
    const int to = (head * plan.rows + place + row) * Tile::kStride + unit;
    copy_async16(keys + to, from, key < job.call.tokens);
    copy_async16(values + to, from + job.channels, key < job.call.tokens);
  }
}

/// Until a stage is there for all threads. Its predecessor's place is free then, and is filled again.
template <class Tile, class T = typename Tile::Element>
__device__ __forceinline__ void await_stage(const Job& job, const T* heads, T* keys, T* values, int stage) {
  wait_copies(job.plan.slots - (stage == 0 ? 1 : 2));
  __syncthreads();
  if (stage == 0) return;
  load_stage<Tile>(job, heads, keys, values, stage + job.plan.slots - 1);
  commit_copies();
}

/// What is added to a key's logits, in powers of two: its size; nothing is left of keys past the last.
__device__ __forceinline__ void load_bias(const Job& job, int image, float* bias) {
  const float* sizes = job.call.sizes == nullptr ? nullptr : job.call.sizes + size_t(image) * job.call.tokens;
  for (int key = threadIdx.x; key < job.padded; key += blockDim.x) {
    const bool exists = key < job.call.tokens;
    bias[key] = !exists ? -INFINITY : sizes == nullptr ? 0.f : log2f(sizes[key]);
  }
}

/// Adds `left` times 16 keys, fewer than a chunk or a whole one.
template <int Pairs, class Tile, class T>
__device__ __forceinline__ void add_keys(Tile& tile, int left, const T* keys, const T* values, const float* bias,
                                         float scale, float* logits) {
  if (left >= Pairs) {
    tile.template add<Pairs>(keys, values, bias, scale, logits);
  } else if constexpr (Pairs > 1) {
    add_keys<Pairs - 1>(tile, left, keys, values, bias, scale, logits);
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kMaxThreads, Tile::kMinBlocks) attend(const __grid_constant__ Job job) {
  using T = typename Tile::Element;
  constexpr int kChunk = 16 * Tile::kPairs;
  extern __shared__ __align__(16) unsigned char shared[];
  const Plan& plan = job.plan;
  const int tokens = job.call.tokens, groups = job.call.heads / plan.heads, pitch = 3 * job.channels;
  const int split = blockIdx.x % plan.splits, group = blockIdx.x / plan.splits % groups;
  const int image = blockIdx.x / plan.splits / groups, first_head = group * plan.heads;
  const T* heads = static_cast<const T*>(job.call.qkv) + size_t(image) * tokens * pitch + first_head * Tile::kDim;
  T* out = static_cast<T*>(job.call.out) + size_t(image) * tokens * job.channels + first_head * Tile::kDim;
  T* keys = reinterpret_cast<T*>(shared);
  T* values = keys + plan.heads * plan.rows * Tile::kStride;
  auto* bias = reinterpret_cast<float*>(values + plan.heads * plan.rows * Tile::kStride);
  float* class_logits = bias + job.padded;

  admit_next();
  await_earlier();
  for (int stage = 0; stage < plan.slots; ++stage) {
    load_stage<Tile>(job, heads, keys, values, stage);
    commit_copies();
  }
  load_bias(job, image, bias);

  const int tiles = ceil_div(tokens, Tile::kRows), items = plan.heads * tiles, warp = threadIdx.x / kWarp;
  int arrived = 0;  // keys that all threads may read, and those of earlier stages whose place has been taken since
  for (int base = split * plan.warps; base < items; base += plan.splits * plan.warps) {
    const int item = base + warp;
    const bool active = item < items;  // of the whole warp; idle ones help to load
    const int head = active ? item / tiles : 0, first = (item - head * tiles) * Tile::kRows;
    float* logits = class_logits + head * job.padded;
    const bool classed = job.call.class_rows != nullptr && first == 0;
    Tile tile;
    if (active) tile.start(heads + head * Tile::kDim, first, tokens, pitch);
    int place = head * plan.rows;
    for (int key = 0; key < job.padded; key += kChunk, place += kChunk) {
      if (key >= arrived) {
        await_stage<Tile>(job, heads, keys, values, key / plan.stage);
        arrived += plan.stage;
        if (key > 0 && place == plan.rows) place = 0;  // of a ring, which has one head
      }
      if (!active) continue;
      const int at = place * Tile::kStride;
      add_keys<Tile::kPairs>(tile, (job.padded - key) / 16, keys + at, values + at, bias + key, job.scale,
                             classed ? logits + key : nullptr);
    }
    if (active) {
      const size_t row = (size_t(image) * job.call.heads + first_head + head) * tokens;  // of what has one of each head
      float* log_sum = job.call.log_sum == nullptr ? nullptr : job.call.log_sum + row;
      tile.finish(out + head * Tile::kDim, first, tokens, job.channels, classed ? logits : nullptr,
                  job.call.class_rows + row, log_sum);
    }
  }
}

template <class Tile>
size_t shared_bytes(const AttentionCall& call, int heads, int rows) {
  const size_t floats = size_t(round_up(call.tokens, 16)) * (call.class_rows == nullptr ? 1 : 1 + heads);
  return size_t(heads) * rows * Tile::kStride * 2 * sizeof(typename Tile::Element) + floats * sizeof(float);
}

/// Keys in shared memory: all of them where two blocks still fit on a multiprocessor or a ring would be no smaller,
/// else a ring of chunks.
template <class Tile>
void place_keys(Plan& plan, const AttentionCall& call, size_t limit) {
  constexpr int kChunk = 16 * Tile::kPairs;
  const int padded = round_up(call.tokens, 16);
  const size_t all = shared_bytes<Tile>(call, 1, padded);
  if (all <= std::min(limit, std::max(limit / 2, shared_bytes<Tile>(call, 1, kMaxSlots * kChunk)))) {
    plan.stage = ceil_div(ceil_div(padded, kChunk), kMaxSlots) * kChunk;
    plan.slots = ceil_div(padded, plan.stage);
    plan.rows = padded;
    return;
  }
  plan.stage = kChunk;
  plan.slots = kMaxSlots;
  while (plan.slots > 2 && shared_bytes<Tile>(call, 1, plan.slots * kChunk) > limit) --plan.slots;
  plan.rows = plan.slots * kChunk;
}

template <class Tile>
Plan plan_for(const AttentionCall& call, size_t limit, int processors) {
  constexpr int kMaxWarps = Tile::kMaxThreads / kWarp;
  constexpr int kBlocksWanted = 3, kItemsOfPart = 4;  // blocks on a multiprocessor; a warp for each of its schedulers
  Plan plan;
  place_keys<Tile>(plan, call, limit);
  const int padded = round_up(call.tokens, 16), tiles = ceil_div(call.tokens, Tile::kRows);
  const int64_t heads = int64_t(call.batch) * call.heads;
  if (plan.rows < padded) {
    // A ring is filled once: every tile has its own warp.
    const int most = heads * ceil_div(tiles, kMaxWarps) < processors ? kItemsOfPart : kMaxWarps;
    plan.splits = ceil_div(tiles, most);
    plan.warps = ceil_div(tiles, plan.splits);
  } else {
    for (int more = 2; more * tiles <= kMaxWarps && more <= call.heads; ++more) {
      if (call.heads % more == 0 && heads / more >= 2 * processors &&
          shared_bytes<Tile>(call, more, padded) <= limit / 2)
        plan.heads = more;
    }
    const int items = plan.heads * tiles;
    const auto room = int(kBlocksWanted * int64_t(processors) / (heads / plan.heads));
    const int parts = std::max(1, std::min(room, ceil_div(items, kItemsOfPart)));
    const int share = ceil_div(items, parts), rounds = ceil_div(share, std::min(kMaxWarps, Tile::kWarpsWanted));
    plan.warps = std::min(share, std::max(kItemsOfPart, ceil_div(share, rounds)));
    plan.splits = ceil_div(items, plan.warps * rounds);
  }
  plan.shared = shared_bytes<Tile>(call, plan.heads, plan.rows);
  return plan;
}

template <class Tile>
void launch(const AttentionCall& call, const Plan& plan, cudaStream_t stream) {
  const int64_t blocks = int64_t(call.batch) * (call.heads / plan.heads) * plan.splits;
  if (blocks > INT32_MAX) {
    fail(ExitCode::usage, "attention: ", call.batch, " images of ", call.heads,
         " heads are more than one launch takes");
  }
  allow_shared_memory<&attend<Tile>, true>();
  const auto scale = float(1.4426950408889634 / std::sqrt(double(call.head_dim)));
  const Job job{call, plan, round_up(call.tokens, 16), call.heads * call.head_dim, scale};
  launch_dependent<&attend<Tile>>({dim3(unsigned(blocks)), plan.warps * kWarp, plan.shared}, stream, job);
}

template <class Tile>
void run(const AttentionCall& call, cudaStream_t stream) {
  const size_t limit = shared_memory_limit();
  const Plan plan = plan_for<Tile>(call, limit, multiprocessors());
  if (plan.shared > limit) {
    fail(ExitCode::device, "attention: heads of ", call.head_dim, " channels and ", call.tokens, " tokens need ",
         plan.shared, " bytes of shared memory, the device gives a block ", limit);
  }
  launch<Tile>(call, plan, stream);
}

template <class T, int D>
void run_dim(const AttentionCall& call, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    run<SimtTile<D>>(call, stream);
  } else {
    run<MmaTile<T, D, 1>>(call, stream);
  }
}

template <class T>
void run_type(const AttentionCall& call, cudaStream_t stream) {
  switch (call.head_dim) {
    case 16:
      return run_dim<T, 16>(call, stream);
    case 32:
      return run_dim<T, 32>(call, stream);
    case 48:
      return run_dim<T, 48>(call, stream);
    case 64:
      return run_dim<T, 64>(call, stream);
    case 80:
      return run_dim<T, 80>(call, stream);
    case 96:
      return run_dim<T, 96>(call, stream);
    case 112:
      return run_dim<T, 112>(call, stream);
    case 128:
      return run_dim<T, 128>(call, stream);
    default:
      fail(ExitCode::internal, "attention: no kernel for ", call.head_dim, " channels a head");
  }
}

void check(const AttentionCall& call) {
  const auto aligned = [](const void* data, size_t to) { return reinterpret_cast<uintptr_t>(data) % to == 0; };
  if (call.head_dim < 16 || call.head_dim > 128 || call.head_dim % 16 != 0) {
    fail(ExitCode::usage, "attention: heads of ", call.head_dim, " channels, expected a multiple of 16 from 16 to 128");
  }
  if (call.tokens < 1 || call.tokens > 1024) {
    fail(ExitCode::usage, "attention: ", call.tokens, " tokens, expected 1 to ", 1024);
  }
  if (call.batch < 0 || call.heads < 1 || call.heads > 1024) {
    fail(ExitCode::usage, "attention: ", call.batch, " images of ", call.heads, " heads, expected 1 to 1024 heads");
  }
  if (call.batch == 0) return;
  if (call.qkv == nullptr || call.out == nullptr || !aligned(call.qkv, 16) || !aligned(call.out, 16)) {
    fail(ExitCode::usage, "attention: qkv and out must be given, at addresses that 16 divides");
  }
  if (!aligned(call.sizes, 4) || !aligned(call.class_rows, 4) || !aligned(call.log_sum, 4)) {
    fail(ExitCode::usage, "attention: sizes, class_rows and log_sum must lie at addresses that 4 divides");
  }
}

}  // namespace

bool attention_overlaps(const AttentionCall& call) {
  return attention_sm90_takes(call);
}

int attention(const AttentionCall& call, cudaStream_t stream) {
  check(call);
  if (call.batch == 0) return 0;
  if (const int blocks = attention_sm90(call, stream)) return call.done ? blocks : 0;
  with_type(call.dtype, [&]<class T>(T) { run_type<T>(call, stream); });
  return 0;
}

}  // namespace pyra::kernels::cuda
