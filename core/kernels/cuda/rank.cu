// DiffRate's ranking: tokens by the class token's attention, and for each of the R beyond the first K the most alike of
// those K.
//
// Grid: x the images (a cluster of up to 8 blocks each where the batch leaves SMs idle: the candidates are split among
// them), y chunks of up to 32 of the R rows. Every block ranks its image anew: N means over heads and N^2 comparisons
// are cheaper than another kernel. Then it streams its rows and candidates through shared memory, 32 channels at a time
// in fp32, the next ones on their way in registers. A thread owns a tile of 4x8 (4x4 where the batch is small) scores
// and, of each 32 channels, 8: four threads a tile, whose sums are added in one order at the end. Neither the split of
// the candidates nor the tile shows in a score, so results do not depend on the batch. Bytes moved: K + R rows of C,
// once from device memory (again from L2 for each further chunk of rows, and R rows for each further pass over the
// candidates); [B,H,N] fp32 once a block.
#include "kernels/cuda/rank.h"

#include <algorithm>

#include "base/error.h"
#include "kernels/cuda/cosine.cuh"
#include "kernels/cuda/dependent.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kThreads = kSearchThreads;
constexpr int kMostTokens = 1024;
constexpr int kMostRows = 32;  // of a block
constexpr int kTileRows = 4;
constexpr int kMostStaged = 192;  // rows and candidates in shared memory at a time
constexpr int kDepth = 32;        // channels at a time
constexpr int kPitch = kDepth + 4;
constexpr int kSplits = 4;                     // threads a tile
constexpr int kSplitDepth = kDepth / kSplits;  // channels of each
constexpr int kSlots = kThreads / kSplits;     // tiles at a time

struct Shape {
  int tokens, heads, channels;
  int keep, tail, protected_tokens;
  int cluster;  // blocks that share the candidates
  int rows;     // of a block, a multiple of a tile's
  int columns;  // candidates at a time, a multiple of a tile's
};

/// Byte offsets into shared memory. `exchange` overlays the stages.
struct Layout {
  int stage, stage_floats, partial, best, gathered, inverse, order, ranked, bytes;
};

Layout lay_out(const Shape& shape, int tile_columns) {
  SharedBytes shared;
  Layout at{};
  at.stage_floats = (shape.rows + shape.columns) * kPitch;
  const int exchange = (kSplits - 1) * kTileRows * tile_columns * kSlots;
  at.stage = shared.take<float>(shape.tail == 0 ? 0 : std::max(2 * at.stage_floats, exchange));
  at.partial = shared.take<uint64_t>(kTileRows * kSlots);
  at.best = shared.take<uint64_t>(kMostRows);
  at.gathered = shared.take<uint64_t>(kMostClustered * kMostRows);
  at.inverse = shared.take<float>(kMostStaged);
  at.order = shared.take<uint64_t>(shape.tokens);
  at.ranked = shared.take<uint16_t>(shape.tokens);
  at.bytes = shared.next;
  return at;
}

/// ranked[0,N): protected tokens in place, then the others by descending attention. Ends with a barrier.
__device__ void rank_all(const Shape& shape, const float* class_rows, uint64_t* order, uint16_t* ranked) {
  const int first = shape.protected_tokens;
  for (int i = int(threadIdx.x); i < shape.tokens; i += kThreads) {
    order[i] = sort_key(attention_mean(class_rows, shape.heads, shape.tokens, i), i);
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < shape.tokens; i += kThreads) {
    const int rank = i < first ? i : first + count_smaller(order + first, shape.tokens - first, order[i]);
    ranked[rank] = uint16_t(i);
  }
  __syncthreads();
}

/// What one block of threads stages: `rows` tokens of `ranked` from `first_row` on, then `columns` from `first_column`.
struct Staged {
  const uint16_t* ranked;
  int first_row, rows, first_column, columns;
  int column_slot;  // where the columns begin in the stage
};

template <class T>
constexpr int kVectors = kDepth / kChunk<T>;  // 16-byte accesses a token and stage
template <class T>
constexpr int kItems = kMostStaged* kVectors<T> / kThreads;  // accesses a thread

/// This thread's share of the channels from `channel` on; zeros beyond the last.
template <class T>
__device__ __forceinline__ void fetch(const T* x, int channels, int channel, const Staged& staged,
                                      uint4 (&raw)[kItems<T>]) {
#pragma unroll
  for (int i = 0; i < kItems<T>; ++i) {
    const int item = int(threadIdx.x) + i * kThreads, place = item / kVectors<T>;
    const int c = channel + item % kVectors<T> * kChunk<T>;
    raw[i] = make_uint4(0, 0, 0, 0);
    if (place >= staged.rows + staged.columns || c >= channels) continue;
    const int rank = place < staged.rows ? staged.first_row + place : staged.first_column + place - staged.rows;
    raw[i] = *reinterpret_cast<const uint4*>(x + int64_t(staged.ranked[rank]) * channels + c);
  }
}

template <class T>
__device__ __forceinline__ void put(const uint4 (&raw)[kItems<T>], const Staged& staged, float* stage) {
#pragma unroll
  for (int i = 0; i < kItems<T>; ++i) {
    const int item = int(threadIdx.x) + i * kThreads, place = item / kVectors<T>;
    if (place >= staged.rows + staged.columns) continue;
    const int slot = place < staged.rows ? place : staged.column_slot + place - staged.rows;
    float values[kChunk<T>];
    unpack(raw[i], values, T{});
    store_chunk(stage + slot * kPitch + item % kVectors<T> * kChunk<T>, values);
  }
}

/// Adds the squares of one staged token, four sums that keep their channels.
__device__ __forceinline__ void add_squares(const float* token, float4& square) {
#pragma unroll
  for (int d = 0; d < kDepth; d += 4) {
    const float4 x = *reinterpret_cast<const float4*>(token + d);
    square.x = fmaf(x.x, x.x, square.x);
    square.y = fmaf(x.y, x.y, square.y);
    square.z = fmaf(x.z, x.z, square.z);
    square.w = fmaf(x.w, x.w, square.w);
  }
}

/// Adds the sums of a tile's four threads into the first's, in one order. Ends with a barrier.
template <int kRows, int kColumns>
__device__ void add_splits(float (&sum)[kRows][kColumns], bool active, float* exchange) {
  const int split = int(threadIdx.x) / kSlots, slot = int(threadIdx.x) % kSlots;
  const auto place = [&](int from, int i, int j) { return (((from - 1) * kRows + i) * kColumns + j) * kSlots + slot; };
  if (active && split > 0) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) exchange[place(split, i, j)] = sum[i][j];
    }
  }
  __syncthreads();
  if (active && split == 0) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        sum[i][j] = (sum[i][j] + exchange[place(1, i, j)]) + (exchange[place(2, i, j)] + exchange[place(3, i, j)]);
      }
    }
  }
  __syncthreads();
}

/// One pass: the best of the staged columns for each staged row, into best[row]. All threads; begins after a barrier
/// and ends with one. inverse[slot] is left with the inverse norms.
template <class T, int kRows, int kColumns>
__device__ void search(const T* x, int channels, const Staged& staged, int first_candidate, float* stage,
                       int stage_floats, float* inverse, uint64_t* partial, uint64_t* best) {
  const int split = int(threadIdx.x) / kSlots, slot = int(threadIdx.x) % kSlots;
  const Tiling tiles = tiling<kRows, kColumns>(staged.rows, staged.columns);
  const bool active = slot < tiles.count(), squares = int(threadIdx.x) < staged.column_slot + staged.columns;
  const int row = slot / tiles.across, column = slot % tiles.across;
  const int row_at = row * kPitch + split * kSplitDepth;
  const int column_at = (staged.column_slot + column) * kPitch + split * kSplitDepth;
  float sum[kRows][kColumns] = {};
  float4 square = make_float4(0, 0, 0, 0);
  uint4 raw[kItems<T>];
  fetch<T>(x, channels, 0, staged, raw);
  put<T>(raw, staged, stage);
  __syncthreads();
  for (int channel = 0, now = 0; channel < channels; channel += kDepth, now ^= 1) {
    const float* current = stage + now * stage_floats;
    const bool more = channel + kDepth < channels;
    if (more) fetch<T>(x, channels, channel + kDepth, staged, raw);
    if (squares) add_squares(current + int(threadIdx.x) * kPitch, square);
    if (active) {
      multiply(current + row_at, tiles.down * kPitch, current + column_at, tiles.across * kPitch, kSplitDepth, sum);
    }
    if (more) put<T>(raw, staged, stage + (now ^ 1) * stage_floats);
    __syncthreads();
  }
  if (squares) inverse[threadIdx.x] = inverse_norm((square.x + square.y) + (square.z + square.w));
  add_splits(sum, active, stage);
  if (active && split == 0) {
    const float* scale = inverse + staged.column_slot;
    store_best(
        sum, column, tiles.across, staged.columns, first_candidate, [&](int j) { return scale[j]; }, partial, kSlots,
        slot);
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < staged.rows; i += kThreads) {
    best[i] = better_partner(best[i], partial, kSlots, tiles, i, 0, tiles.count());
  }
  __syncthreads();
}

struct Outputs {
  int32_t *keep, *src, *dst;
  float* cosine;
};

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads, 2)
    rank_kernel(const T* tokens, const float* class_rows, Shape shape, Layout at, Outputs out) {
  extern __shared__ __align__(16) unsigned char shared[];
  const auto floats = [&](int offset) { return reinterpret_cast<float*>(shared + offset); };
  const auto longs = [&](int offset) { return reinterpret_cast<uint64_t*>(shared + offset); };
  const int cluster = shape.cluster, rank = int(blockIdx.x) % cluster, thread = int(threadIdx.x);
  const int64_t image = int(blockIdx.x) / cluster;
  const int first_row = int(blockIdx.y) * shape.rows, rows = min(shape.rows, shape.tail - first_row);
  auto* ranked = reinterpret_cast<uint16_t*>(shared + at.ranked);
  admit_next();
  await_earlier();
  rank_all(shape, class_rows + image * shape.heads * shape.tokens, longs(at.order), ranked);
  if (rank == 0 && blockIdx.y == 0) {
    for (int i = thread; i < shape.keep; i += kThreads) out.keep[image * shape.keep + i] = ranked[i];
    for (int i = thread; i < shape.tail; i += kThreads) out.src[image * shape.tail + i] = ranked[shape.keep + i];
  }
  if (shape.tail == 0) return;

  const int candidates = shape.keep - shape.protected_tokens, share = (candidates + cluster - 1) / cluster;
  const int own_first = min(rank * share, candidates), own_last = min(own_first + share, candidates);
  uint64_t* best = longs(at.best);
  for (int i = thread; i < rows; i += kThreads) best[i] = kNoPartner;
  __syncthreads();
  for (int first = own_first; first < own_last; first += shape.columns) {
    const Staged staged{
        ranked,    shape.keep + first_row, rows, shape.protected_tokens + first, min(shape.columns, own_last - first),
        shape.rows};
    search<T, kTileRows, kColumns>(tokens + image * shape.tokens * shape.channels, shape.channels, staged, first,
                                   floats(at.stage), at.stage_floats, floats(at.inverse), longs(at.partial), best);
  }

  uint64_t* gathered = longs(at.gathered);
  barrier(cluster);  // the first block has started
  for (int i = thread; i < rows; i += kThreads) of_block(gathered, 0, cluster)[rank * kMostRows + i] = best[i];
  barrier(cluster);
  if (rank != 0) return;
  for (int i = thread; i < rows; i += kThreads) {
    uint64_t partner = kNoPartner;
    for (int from = 0; from < cluster; ++from) partner = max(partner, gathered[from * kMostRows + i]);
    float score = score_of(partner);
    if (score != -INFINITY) score *= floats(at.inverse)[i];
    const int64_t to = image * shape.tail + first_row + i;
    out.dst[to] = shape.protected_tokens + column_of(partner);
    out.cosine[to] = score;
  }
}

__global__ void __launch_bounds__(kThreads)
    class_attention_mean_kernel(const float* class_rows, int heads, int tokens, int64_t count, float* out) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= count) return;
  const int64_t image = item / tokens;
  out[item] = attention_mean(class_rows + image * heads * tokens, heads, tokens, int(item - image * tokens));
}

void check(const RankCall& call) {
  const int p = call.protected_tokens;
  if (call.batch < 0 || call.token_count < 1 || call.token_count > kMostTokens || call.heads < 1 || call.channels < 8 ||
      call.channels % 8 != 0) {
    fail(ExitCode::usage, "rank: ", call.batch, " x ", call.token_count, " tokens of ", call.channels, ", ", call.heads,
         " heads; expected 1 to ", kMostTokens, " tokens and a multiple of 8 channels");
  }
  const bool ordered = 0 <= p && p <= call.merge && call.merge <= call.prune && call.prune <= call.token_count;
  if (!ordered || (call.merge == p && call.prune > call.merge)) {
    fail(ExitCode::usage, "rank: prune ", call.prune, " and merge ", call.merge, " do not fit ", call.token_count,
         " tokens, ", p, " of them protected");
  }
  const bool has_tail = call.prune > call.merge;
  if (call.batch > 0 && (!call.class_rows || (call.merge > 0 && !call.keep) ||
                         (has_tail && (!call.tokens || !call.src || !call.dst || !call.cosine)))) {
    fail(ExitCode::usage, "rank: tokens, class rows and outputs must be device memory");
  }
  if (reinterpret_cast<uintptr_t>(call.tokens) % 16 != 0) fail(ExitCode::usage, "rank: tokens must be 16-byte aligned");
}

/// Sets how many candidates are staged at a time: as many as threads, registers and shared memory allow, in passes of
/// even size. False where not even one tile's fit.
bool fit(Shape& shape, int tile_columns, Layout& at) {
  const int share = (shape.keep - shape.protected_tokens + shape.cluster - 1) / shape.cluster;
  const int most =
      std::min(kSlots / (shape.rows / kTileRows), (kMostStaged - shape.rows) / tile_columns) * tile_columns;
  const size_t limit = shared_memory_limit();
  for (int passes = std::max(1, (share + most - 1) / most);; ++passes) {
    shape.columns = std::max(tile_columns, round_up((share + passes - 1) / passes, tile_columns));
    at = lay_out(shape, tile_columns);
    if (size_t(at.bytes) <= limit) return true;
    if (shape.columns == tile_columns) return false;
  }
}

template <class T, int kColumns>
void launch(const RankCall& call, const Shape& shape, const Layout& at, cudaStream_t stream) {
  const int chunks = std::max(1, (shape.tail + shape.rows - 1) / shape.rows);
  launch_dependent<&rank_kernel<T, kColumns>>(
      {dim3(unsigned(call.batch * shape.cluster), unsigned(chunks)), kSearchThreads, size_t(at.bytes), shape.cluster},
      stream, static_cast<const T*>(call.tokens), call.class_rows, shape, at,
      Outputs{call.keep, call.src, call.dst, call.cosine});
}

/// Rows, columns and cluster; false where shared memory does not suffice.
bool plan(Shape& shape, const Device& device, int batch, int most_rows, int tile_columns, Layout& at) {
  constexpr int kCandidatesOfBlock = 16;
  shape.rows = std::min(most_rows, std::max(kTileRows, round_up(shape.tail, kTileRows)));
  const int64_t blocks = int64_t(batch) * std::max(1, (shape.tail + shape.rows - 1) / shape.rows);
  const int candidates = shape.tail == 0 ? 0 : shape.keep - shape.protected_tokens;
  shape.cluster = cluster_size(device, blocks, candidates, kCandidatesOfBlock);
  return fit(shape, tile_columns, at);
}

}  // namespace

void rank_tokens(const RankCall& call, cudaStream_t stream) {
  constexpr int kRowsOfSmall = 8;
  check(call);
  if (call.batch == 0) return;
  Shape shape{};
  shape.tokens = call.token_count;
  shape.heads = call.heads;
  shape.channels = call.channels;
  shape.keep = call.merge;
  shape.tail = call.prune - call.merge;
  shape.protected_tokens = call.protected_tokens;
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    const Device device = device_for<&rank_kernel<T, 4>>();
    // Few images: many small blocks, for the shortest way through; many: the least traffic.
    const bool small = int64_t(call.batch) * ((shape.tail + kMostRows - 1) / kMostRows) * 2 <= device.processors;
    Layout at{};
    if (!small && plan(shape, device, call.batch, kMostRows, 8, at)) return launch<T, 8>(call, shape, at, stream);
    if (plan(shape, device, call.batch, kRowsOfSmall, 4, at)) return launch<T, 4>(call, shape, at, stream);
    fail(ExitCode::device, "rank: ", shape.tokens, " tokens need ", at.bytes,
         " bytes of shared memory; this device has ", shared_memory_limit(), " a block");
  });
}

void class_attention_mean(const float* class_rows, int batch, int heads, int tokens, float* out, cudaStream_t stream) {
  if (batch < 0 || heads < 1 || tokens < 1) {
    fail(ExitCode::usage, "class_attention_mean: rows [", batch, ", ", heads, ", ", tokens,
         "]; expected at least one head and token");
  }
  if (batch == 0) return;
  if (!class_rows || !out) fail(ExitCode::usage, "class_attention_mean: rows and out must be device memory");
  const int64_t count = int64_t(batch) * tokens;
  const auto blocks = unsigned((count + kThreads - 1) / kThreads);
  class_attention_mean_kernel<<<blocks, kThreads, 0, stream>>>(class_rows, heads, tokens, count, out);
  PYRA_CUDA_LAUNCHED();
}

}  // namespace pyra::kernels::cuda
