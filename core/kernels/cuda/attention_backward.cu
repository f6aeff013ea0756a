// The gradient of softmax(q kᵀ / sqrt(D) + log(size)) v, head by head, as described by attention_backward.h.
//
// Hopper has a way of its own for many shapes (attention_backward_sm90.cu); what follows is open to all devices, types
// and shapes.
//
// Two passes, each a launch (attention_backward_terms.cuh): in one a warp owns 16 keys and sums their dK and dV over
// all queries, in the other 16 queries and sums their dQ over all keys. So every sum stays in one warp's registers in
// one order, nothing is added up across warps, and no N x N matrix exists; the price is that logits and dO Vᵀ are
// multiplied twice, seven products instead of five. A block has up to four warps: tiles of one head, or several heads
// where a head has one or two tiles. What its warps go over (Q and dO, or K and V) comes to shared memory by
// asynchronous copies, a chunk of 16 or 32 columns at a time, the next one or two on their way while one is multiplied.
// rowsum(dO ∘ out) is made by each block that needs it: it costs a read of two rows, and a workspace would cost a
// launch.
//
// Bytes moved, if L2 keeps a head's: qkv, out and dO once, d_qkv once, B N 8C elements; from L2 each block brings 4 or
// 2 rows for each column. Work: 14 B H N² D operations. Not measured yet.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>

#include "base/error.h"
#include "kernels/cuda/attention_backward.h"
#include "kernels/cuda/attention_backward_mma.cuh"
#include "kernels/cuda/attention_backward_paths.h"
#include "kernels/cuda/attention_backward_simt.cuh"
#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kMaxWarps = 4, kMaxSlots = 3;

/// How a problem is cut: `splits` blocks share the tiles of `heads` heads of an image, a tile a warp; `slots` chunks of
/// columns are in shared memory at once.
struct Plan {
  int heads = 1, splits = 1, warps = 1, slots = 1;
  size_t shared = 0;
};

struct Job {
  AttentionBackwardCall call;
  Plan plan;
  int padded;  ///< tokens, rounded up to 16
  int channels;
  float scale;   ///< of a product of q and k, to powers of two
  float factor;  ///< of dQ and dK: 1 / sqrt(D)
};

constexpr int ceil_div(int n, int by) {
  return (n + by - 1) / by;
}

/// Starts the copies of a chunk of both operands, zeros past the last column, and closes their group; none, for a chunk
/// past the last.
template <class Tile, class T = typename Tile::Element>
__device__ __forceinline__ void load_chunk(const Job& job, const Operand<T>& x, const Operand<T>& z, T* x_columns,
                                           T* z_columns, int chunk) {
  constexpr int kPer = 16 / sizeof(T), kUnits = Tile::kDim / kPer, kChunk = 16 * Tile::kPairs;
  const int first = chunk * kChunk, heads = job.plan.heads, slot = chunk % job.plan.slots * heads;
  const int lines = min(kChunk, job.padded - first) * heads;
#pragma unroll 1  // the copies do not wait for one another as it is, and registers are dear
  for (int i = threadIdx.x; i < lines * kUnits; i += blockDim.x) {
    const int line = i / kUnits, unit = i % kUnits * kPer, row = line / heads, head = line - row * heads;
    const int column = first + row, readable = min(column, job.call.tokens - 1);
    const bool wanted = column < job.call.tokens;
    const int to = ((slot + head) * kChunk + row) * Tile::kStride + unit;
    copy_async16(x_columns + to, x.row(readable) + head * Tile::kDim + unit, wanted);
    copy_async16(z_columns + to, z.row(readable) + head * Tile::kDim + unit, wanted);
  }
  commit_copies();
}

/// Adds `left` times 16 columns, fewer than a chunk or a whole one.
template <int Pairs, class Tile, class T>
__device__ __forceinline__ void add_columns(Tile& tile, int left, const T* x, const T* z, const float* shift,
                                            const float* delta, float scale) {
  if (left >= Pairs) {
    tile.template add<Pairs>(x, z, shift, delta, scale);
  } else if constexpr (Pairs > 1) {
    add_columns<Pairs - 1>(tile, left, x, z, shift, delta, scale);
  }
}

template <class Tile>
__global__ void __launch_bounds__(kMaxWarps* kWarp, Tile::kMinBlocks) attend_backward(const __grid_constant__ Job job) {
  using T = typename Tile::Element;
  constexpr int kDim = Tile::kDim, kChunk = 16 * Tile::kPairs;
  constexpr bool kKeys = Tile::kKeys;
  extern __shared__ __align__(16) unsigned char shared[];
  const AttentionBackwardCall& call = job.call;
  const Plan& plan = job.plan;
  const int tokens = call.tokens, channels = job.channels, pitch = 3 * channels, groups = call.heads / plan.heads;
  const int split = blockIdx.x % plan.splits, group = blockIdx.x / plan.splits % groups;
  const int image = blockIdx.x / plan.splits / groups, first_head = group * plan.heads;
  const size_t row0 = size_t(image) * tokens, channel0 = size_t(first_head) * kDim;
  const Operand<T> q{static_cast<const T*>(call.qkv) + row0 * pitch + channel0, pitch};
  const Operand<T> k{q.at + channels, pitch}, v{k.at + channels, pitch};
  const Operand<T> d_out{static_cast<const T*>(call.d_out) + row0 * channels + channel0, channels};
  const Operand<T> out{static_cast<const T*>(call.out) + row0 * channels + channel0, channels};
  const float* sizes = call.sizes == nullptr ? nullptr : call.sizes + row0;
  const float* log_sum = call.log_sum + (size_t(image) * call.heads + first_head) * tokens;

  T* x_columns = reinterpret_cast<T*>(shared);                                  // of Q, or of K
  T* z_columns = x_columns + plan.slots * plan.heads * kChunk * Tile::kStride;  // of dO, or of V
  auto* shift = reinterpret_cast<float*>(z_columns + plan.slots * plan.heads * kChunk * Tile::kStride);
  float* delta = shift + plan.heads * job.padded;

  const int chunks = ceil_div(job.padded, kChunk), ahead = max(1, plan.slots - 1);
  const auto load = [&](int chunk) {
    load_chunk<Tile>(job, kKeys ? q : k, kKeys ? d_out : v, x_columns, z_columns, chunk);
  };
  for (int chunk = 0; chunk < ahead; ++chunk) load(chunk);
  for (int i = threadIdx.x; i < plan.heads * job.padded; i += blockDim.x) {
    const int head = i / job.padded, column = i - head * job.padded;
    shift[i] = kKeys ? query_term(log_sum + head * tokens, column, tokens) : key_term(sizes, column, tokens);
  }
  // Of all queries where they are columns, else of the block's own.
  const bool some = !kKeys && plan.heads == 1;
  const int first_delta = some ? split * plan.warps * Tile::kRows : 0;
  const int end_delta = some ? min(first_delta + plan.warps * Tile::kRows, job.padded) : job.padded;
  for (int head = 0; head < plan.heads; ++head)
    load_delta<T, kDim>({out.at + head * kDim, channels}, {d_out.at + head * kDim, channels}, first_delta, end_delta,
                        tokens, delta + head * job.padded);
  __syncthreads();

  const int tiles = ceil_div(tokens, Tile::kRows), item = split * plan.warps + threadIdx.x / kWarp;
  const bool active = item < plan.heads * tiles;  // of the whole warp; idle ones help to load
  const int head = active ? item / tiles : 0, first = (item - head * tiles) * Tile::kRows, at = head * kDim;
  const float *head_shift = shift + head * job.padded, *head_delta = delta + head * job.padded;
  Tile tile;
  if (active) {
    const RowTerms<kKeys> terms{sizes, log_sum + head * tokens, head_delta, tokens};
    if constexpr (kKeys) {
      tile.start({k.at + at, pitch}, {v.at + at, pitch}, terms, first, tokens);
    } else {
      tile.start({q.at + at, pitch}, {d_out.at + at, channels}, terms, first, tokens);
    }
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_copies(ahead - 1);
    __syncthreads();  // the chunk is there for all threads, and the place of the one before it is free
    load(chunk + ahead);
    if (!active) continue;
    const int place = (chunk % plan.slots * plan.heads + head) * kChunk * Tile::kStride, column = chunk * kChunk;
    add_columns<Tile::kPairs>(tile, (job.padded - column) / 16, x_columns + place, z_columns + place,
                              head_shift + column, head_delta + column, job.scale);
  }
  if (active) {
    T* grad = static_cast<T*>(call.d_qkv) + row0 * pitch + channel0 + at;
    tile.finish(grad + (kKeys ? channels : 0), grad + 2 * channels, first, tokens, pitch, job.factor);
  }
}

template <class Tile>
size_t shared_bytes(int padded, int heads, int slots) {
  return size_t(heads) *
         (size_t(slots) * 16 * Tile::kPairs * Tile::kStride * 2 * sizeof(typename Tile::Element) + size_t(padded) * 8);
}

template <class Tile>
Plan plan_for(const AttentionBackwardCall& call, size_t limit) {
  Plan plan;
  const int padded = round_up(call.tokens, 16), tiles = ceil_div(call.tokens, Tile::kRows);
  plan.slots = std::min(kMaxSlots, ceil_div(padded, 16 * Tile::kPairs));
  if (plan.slots > 2 && shared_bytes<Tile>(padded, 1, plan.slots) > limit / Tile::kMinBlocks) plan.slots = 2;
  for (int more = 2; more * tiles <= kMaxWarps && more <= call.heads; ++more)
    if (call.heads % more == 0 && shared_bytes<Tile>(padded, more, plan.slots) <= limit / Tile::kMinBlocks)
      plan.heads = more;
  const int items = plan.heads * tiles;
  plan.splits = ceil_div(items, kMaxWarps);
  plan.warps = ceil_div(items, plan.splits);
  plan.shared = shared_bytes<Tile>(padded, plan.heads, plan.slots);
  return plan;
}

template <class Tile>
void run_pass(const AttentionBackwardCall& call, cudaStream_t stream) {
  const size_t limit = shared_memory_limit();
  const Plan plan = plan_for<Tile>(call, limit);
  if (plan.shared > limit) {
    fail(ExitCode::device, "attention_backward: heads of ", call.head_dim, " channels and ", call.tokens,
         " tokens need ", plan.shared, " bytes of shared memory, the device gives a block ", limit);
  }
  const int64_t blocks = int64_t(call.batch) * (call.heads / plan.heads) * plan.splits;
  if (blocks > INT32_MAX) {
    fail(ExitCode::usage, "attention_backward: ", call.batch, " images of ", call.heads,
         " heads are more than one launch takes");
  }
  allow_shared_memory<&attend_backward<Tile>, true>();
  const double factor = 1.0 / std::sqrt(double(call.head_dim));
  const Job job{
      call,         plan, round_up(call.tokens, 16), call.heads * call.head_dim, float(1.4426950408889634 * factor),
      float(factor)};
  attend_backward<Tile><<<unsigned(blocks), plan.warps * kWarp, plan.shared, stream>>>(job);
  PYRA_CUDA_LAUNCHED();
}

template <class T, int D>
void run_dim(const AttentionBackwardCall& call, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    run_pass<SimtBackward<D, true>>(call, stream);
    run_pass<SimtBackward<D, false>>(call, stream);
  } else {
    run_pass<MmaBackward<T, D, true>>(call, stream);
    run_pass<MmaBackward<T, D, false>>(call, stream);
  }
}

template <class T>
void run_type(const AttentionBackwardCall& call, cudaStream_t stream) {
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
      fail(ExitCode::internal, "attention_backward: no kernel for ", call.head_dim, " channels a head");
  }
}

void check(const AttentionBackwardCall& call) {
  constexpr const char* kWho = "attention_backward";
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 4 == 0; };
  check_dtype(kWho, call.dtype);
  if (call.head_dim < 16 || call.head_dim > 128 || call.head_dim % 16 != 0) {
    fail(ExitCode::usage, kWho, ": heads of ", call.head_dim, " channels, expected a multiple of 16 from 16 to 128");
  }
  if (call.tokens < 1 || call.tokens > 1024) {
    fail(ExitCode::usage, kWho, ": ", call.tokens, " tokens, expected 1 to ", 1024);
  }
  if (call.batch < 0 || call.heads < 1 || call.heads > 1024) {
    fail(ExitCode::usage, kWho, ": ", call.batch, " images of ", call.heads, " heads, expected 1 to 1024 heads");
  }
  if (call.batch == 0) return;
  check_pointer(kWho, "qkv", call.qkv);
  check_pointer(kWho, "out", call.out);
  check_pointer(kWho, "d_out", call.d_out);
  check_pointer(kWho, "d_qkv", call.d_qkv);
  if (call.log_sum == nullptr) fail(ExitCode::usage, kWho, ": log_sum is null");
  if (!aligned(call.sizes) || !aligned(call.log_sum)) {
    fail(ExitCode::usage, kWho, ": sizes and log_sum must lie at addresses that 4 divides");
  }
}

}  // namespace

void attention_backward(const AttentionBackwardCall& call, cudaStream_t stream) {
  check(call);
  if (call.batch == 0 || attention_backward_sm90(call, stream)) return;
  with_type(call.dtype, [&]<class T>(T) { run_type<T>(call, stream); });
}

}  // namespace pyra::kernels::cuda
