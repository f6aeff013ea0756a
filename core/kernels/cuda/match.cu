// ToMe's matching: for each token of side A the most alike of side B by the head-mean of the keys; the r best leave.
//
// A block an image, or a cluster of up to 8 blocks where the batch leaves SMs idle: each then averages its share of
// side B for all of them, searches for its share of side A, and the first block ranks. Results do not depend on the
// split: a cosine is one chain of FMAs over d in whichever thread, and partners are combined by an integer maximum.
//   1. 16-byte loads of the keys, all heads of 8 channels (16-bit types) in one thread -> mean, fp32, shared memory
//   2. inverse norms, half a warp a token; side B is scaled to unit length, in the shared memory of all blocks
//   3. scores: a thread a tile of 8x8 (down to 2x2 where tiles are few), columns and rows interleaved among the tiles
//   4. a token's rank is the number of smaller sort keys, counted by two threads where tokens are few; where staying
//      tokens go follows from ballots
// Bytes moved: the keys once, [B,N,C] of `dtype`; the plan, 4 (N + r) bytes an image. At 197 tokens of 12 heads of 64
// the keys are 302 KB an image and the product 0.6 M FMA; two blocks share an SM, so one may load while one computes.
// Sides that do not fit shared memory are taken in chunks; then side B is read again for each chunk of side A.
// One image in a pass (H200, globaltimer of the first block), of 197 tokens by 8 blocks and of 27 by one: 8.1 us and
// 5.8; keys 2.1 and 1.5, norms and their way to all blocks 1.8 and 1.2, scores, partners and order 2.8 and 1.7, ranks
// and plan 1.4 and 1.4. It took half as long again while every block normalised all of side B.
#include "kernels/cuda/match.h"

#include <algorithm>

#include "base/error.h"
#include "kernels/cuda/cosine.cuh"
#include "kernels/cuda/dependent.cuh"
#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kThreads = kSearchThreads;
constexpr int kMostTokens = 1024;
constexpr int kMostDim = 128;
constexpr int kHeadsInFlight = 12;  // loads of one thread before the first is used
constexpr int kHalfWarp = 16;

struct Keys {
  int tokens, heads, dim;
  float head_share;  // 1 / heads
};

struct Ahead {
  MatchCall::Ahead parameters[4];
};

struct Shape {
  Keys keys;
  int r, protected_tokens;
  int cluster;        // blocks an image
  int rows, columns;  // chunk of side A and of side B in shared memory, multiples of 8
  int slots;          // tiles at a time
};

/// Byte offsets into shared memory.
struct Layout {
  int a, b, partial, best, order, scale, column, list_a, list_b, leaves, bytes;
};

constexpr int pitch_of(int dim) {
  return dim + 4;
}

Layout lay_out(const Shape& shape, int tile, int most_a, int most_b) {
  SharedBytes shared;
  Layout at{};
  at.a = shared.take<float>(shape.rows * pitch_of(shape.keys.dim));
  at.b = shared.take<float>(shape.columns * pitch_of(shape.keys.dim));
  // And ranks, 4 bytes each, up to two a token of side A.
  at.partial = shared.take<uint64_t>(std::max({tile * shape.slots, kThreads / 2, round_up(most_a, kWarp) / 2}));
  at.best = shared.take<uint64_t>(shape.rows);
  at.order = shared.take<uint64_t>(most_a);
  at.scale = shared.take<float>(shape.rows);
  at.column = shared.take<uint16_t>(most_a);
  at.list_a = shared.take<uint16_t>(most_a);
  at.list_b = shared.take<uint16_t>(most_b);
  at.leaves = shared.take<uint32_t>(kMostTokens / kWarp);
  at.bytes = shared.next;
  return at;
}

/// Mean over heads of the 16 bytes of channels from `first` on of one token's keys, heads in order.
template <class T, int kCount>
__device__ __forceinline__ void head_mean(const T* first, const Keys& keys, float (&mean)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) mean[i] = 0;
#pragma unroll 1
  for (int head = 0; head < keys.heads; head += kHeadsInFlight) {
    uint4 raw[kHeadsInFlight];
#pragma unroll
    for (int h = 0; h < kHeadsInFlight; ++h) {
      // Beyond the last head: zeros, which leave a sum as it is.
      raw[h] = make_uint4(0, 0, 0, 0);
      if (head + h < keys.heads) raw[h] = *reinterpret_cast<const uint4*>(first + h * keys.dim);
    }
    first += kHeadsInFlight * keys.dim;
#pragma unroll
    for (int h = 0; h < kHeadsInFlight; ++h) {
      float key[kCount];
      unpack(raw[h], key, T{});
#pragma unroll
      for (int i = 0; i < kCount; ++i) mean[i] += key[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) mean[i] *= keys.head_share;
}

/// The keys of token `token` (counted over all images), first head.
template <class T>
__device__ __forceinline__ const T* key_of(const T* qkv, const Keys& keys, int64_t token) {
  return qkv + (token * 3 + 1) * (int64_t(keys.heads) * keys.dim);
}

struct Counts {
  int a, b;
};

/// Sides as given: one warp walks the tokens, so that the lists ascend. Counts go to shared memory.
__device__ void list_given_sides(const Shape& shape, const uint8_t* in_side_a, uint16_t* list_a, uint16_t* list_b,
                                 Counts* counts) {
  if (threadIdx.x >= kWarp) return;
  const int lane = int(threadIdx.x);
  const unsigned before = (1u << lane) - 1;
  int a = 0, b = 0;
  for (int first = shape.protected_tokens; first < shape.keys.tokens; first += kWarp) {
    const int token = first + lane;
    const bool exists = token < shape.keys.tokens;
    const bool is_a = exists && in_side_a[token] != 0;
    const unsigned all_a = __ballot_sync(kAllLanes, is_a), all_b = __ballot_sync(kAllLanes, exists && !is_a);
    if (is_a) {
      list_a[a + __popc(all_a & before)] = uint16_t(token);
    } else if (exists) {
      list_b[b + __popc(all_b & before)] = uint16_t(token);
    }
    a += __popc(all_a);
    b += __popc(all_b);
  }
  if (lane == 0) *counts = {a, b};
}

__host__ __device__ constexpr Counts alternating(int tokens, int protected_tokens) {
  return {(tokens + 1) / 2 - (protected_tokens + 1) / 2, tokens / 2 - protected_tokens / 2};
}

/// Both sides without protected tokens, ascending. Ends with a barrier of the block.
__device__ Counts list_sides(const Shape& shape, const uint8_t* in_side_a, uint16_t* list_a, uint16_t* list_b) {
  __shared__ Counts given;
  if (in_side_a) {
    list_given_sides(shape, in_side_a, list_a, list_b, &given);
    __syncthreads();
    return given;
  }
  const Counts counts = alternating(shape.keys.tokens, shape.protected_tokens);
  const int odd = shape.protected_tokens & 1;
  for (int i = int(threadIdx.x); i < max(counts.a, counts.b); i += kThreads) {
    if (i < counts.a) list_a[i] = uint16_t(shape.protected_tokens + odd + 2 * i);
    if (i < counts.b) list_b[i] = uint16_t(shape.protected_tokens + 1 - odd + 2 * i);
  }
  __syncthreads();
  return counts;
}

/// Head means of `count_a` tokens into `a`, of `count_b` into `b`.
template <class T>
__device__ void load_metric(const T* qkv, const Keys& keys, int64_t first_token, const uint16_t* list_a, int count_a,
                            const uint16_t* list_b, int count_b, float* a, float* b) {
  const int pitch = pitch_of(keys.dim), chunks = keys.dim / kChunk<T>;
  for (int item = int(threadIdx.x); item < (count_a + count_b) * chunks; item += kThreads) {
    const int place = item / chunks, d = (item - place * chunks) * kChunk<T>;
    const bool is_a = place < count_a;
    const int row = is_a ? place : place - count_a;
    float mean[kChunk<T>];
    head_mean(key_of(qkv, keys, first_token + (is_a ? list_a : list_b)[row]) + d, keys, mean);
    store_chunk((is_a ? a : b) + row * pitch + d, mean);
  }
}

/// `count_b` rows of `b` to unit length, in every block of the cluster, and inverse norms of `count_a` rows of `a` into
/// `scale`. Half a warp a row, lane l sums the squares of d = l, l + 16, …, what is beyond the last 16 comes after
/// them: kernels/wide.h's order.
__device__ void normalise(const Keys& keys, float* a, int count_a, float* scale, float* b, int count_b, int rank,
                          int cluster) {
  const int lane = int(threadIdx.x) % kHalfWarp, pitch = pitch_of(keys.dim), whole = keys.dim / kHalfWarp * kHalfWarp;
  const unsigned half = 0xffffu << (threadIdx.x & kHalfWarp);
  const int count = count_a + count_b;
  constexpr int kAtOnce = 2;  // rows whose sums a half warp has in flight
  for (int first = int(threadIdx.x) / kHalfWarp; first < count; first += kAtOnce * kThreads / kHalfWarp) {
    float* row[kAtOnce];
    float square[kAtOnce] = {};
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int next = first + u * kThreads / kHalfWarp, place = next < count ? next : first;
      row[u] = place < count_b ? b + place * pitch : a + (place - count_b) * pitch;
    }
    for (int d = lane; d < whole; d += kHalfWarp)
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) square[u] = fmaf(row[u][d], row[u][d], square[u]);
#pragma unroll
    for (int offset = kHalfWarp / 2; offset > 0; offset /= 2)
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) square[u] += __shfl_xor_sync(half, square[u], offset, kHalfWarp);
    for (int d = whole; d < keys.dim; ++d)
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) square[u] = fmaf(row[u][d], row[u][d], square[u]);
    __syncwarp(half);  // all have read the tail before any writes
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int place = first + u * kThreads / kHalfWarp;
      if (place >= count) break;
      const float inverse = inverse_norm(square[u]);
      if (place >= count_b) {
        if (lane == 0) scale[place - count_b] = inverse;
        continue;
      }
      for (int d = 4 * lane; d < keys.dim; d += 4 * kHalfWarp) {
        float4 unit = *reinterpret_cast<float4*>(row[u] + d);
        unit.x *= inverse, unit.y *= inverse, unit.z *= inverse, unit.w *= inverse;
        *reinterpret_cast<float4*>(row[u] + d) = unit;
        for (int next = 1; next < cluster; ++next)  // a power of two
          *reinterpret_cast<float4*>(of_block(row[u], (rank + next) & (cluster - 1), cluster) + d) = unit;
      }
    }
  }
}

/// Improves best[row] by the columns in `b`, whose first is column `first_column` of side B.
template <int kRows, int kColumns>
__device__ void search(const Shape& shape, const float* a, int count_a, const float* b, int count_b, int first_column,
                       uint64_t* partial, uint64_t* best) {
  const int pitch = pitch_of(shape.keys.dim);
  const Tiling tiles = tiling<kRows, kColumns>(count_a, count_b);
  for (int first = 0; first < tiles.count(); first += shape.slots) {
    const int slot = int(threadIdx.x), last = min(first + shape.slots, tiles.count());
    if (first + slot < last) {
      const int row = (first + slot) / tiles.across, column = (first + slot) - row * tiles.across;
      float sum[kRows][kColumns] = {};
      multiply(a + row * pitch, tiles.down * pitch, b + column * pitch, tiles.across * pitch, shape.keys.dim, sum);
      store_best(
          sum, column, tiles.across, count_b, first_column, [](int) { return 1.0f; }, partial, shape.slots, slot);
    }
    __syncthreads();
    // A cluster's share of rows: half a warp for each.
    const int lanes = count_a * kHalfWarp <= kThreads ? kHalfWarp : 1, lane = int(threadIdx.x) % lanes;
    for (int next = 0; next < count_a; next += kThreads / lanes) {
      const int row = next + int(threadIdx.x) / lanes;
      uint64_t better = kNoPartner;
      if (row < count_a)
        better = better_partner(lane == 0 ? best[row] : kNoPartner, partial, shape.slots, tiles, row, first, last, lane,
                                lanes);
      for (int offset = lanes / 2; offset > 0; offset /= 2)
        better = max(better, __shfl_xor_sync(kAllLanes, better, offset));
      if (lane == 0 && row < count_a) best[row] = better;
    }
    __syncthreads();
  }
}

/// Ranks side A by `order` and writes the image's plan. All of it in one block.
__device__ void write_plan(const Shape& shape, Counts counts, const uint64_t* order, const uint16_t* column,
                           const uint16_t* list_a, const uint16_t* list_b, uint32_t* leaves, uint32_t* ranks,
                           int32_t* keep, int32_t* src, int32_t* dst) {
  const int first_b = shape.protected_tokens + counts.a - shape.r, kept = shape.keys.tokens - shape.r;
  const int whole_warps = (counts.a + kWarp - 1) / kWarp * kWarp;
  // Where tokens are few, two threads count for each.
  const int parts = 2 * whole_warps <= kThreads ? 2 : 1, share = (counts.a + parts - 1) / parts;
  for (int item = int(threadIdx.x); shape.r > 0 && item < parts * whole_warps; item += kThreads) {
    const bool second = item >= whole_warps;
    const int row = min(second ? item - whole_warps : item, counts.a - 1), begin = second ? share : 0;
    ranks[item] = uint32_t(count_smaller(order + begin, second ? counts.a - share : share, order[row]));
  }
  __syncthreads();
  for (int row = int(threadIdx.x); row < whole_warps; row += kThreads) {
    int rank = shape.r;
    if (shape.r > 0 && row < counts.a) rank = int(ranks[row] + (parts > 1 ? ranks[whole_warps + row] : 0));
    const bool goes = rank < shape.r;
    const unsigned all = __ballot_sync(kAllLanes, goes);
    if (row % kWarp == 0) leaves[row / kWarp] = all;
    if (goes) {
      src[rank] = list_a[row];
      dst[rank] = first_b + column[row];
    }
  }
  __syncthreads();
  for (int token = int(threadIdx.x); token < shape.protected_tokens; token += kThreads) keep[token] = token;
  for (int row = int(threadIdx.x); row < counts.a; row += kThreads) {
    const uint32_t own = leaves[row / kWarp], bit = 1u << row % kWarp;
    if (own & bit) continue;
    int gone = __popc(own & (bit - 1));
    for (int word = 0; word < row / kWarp; ++word) gone += __popc(leaves[word]);
    const int to = shape.protected_tokens + row - gone;
    if (to < kept) keep[to] = list_a[row];
  }
  // An r beyond side A cannot be seen by the host where sides are given; writes stay in bounds nevertheless.
  for (int i = int(threadIdx.x); i < counts.b; i += kThreads) {
    if (first_b + i >= 0) keep[first_b + i] = list_b[i];
  }
}

template <class T, int kRows, int kColumns>
__global__ void __launch_bounds__(kThreads, 2)
    match_kernel(const T* qkv, Shape shape, Layout at, const uint8_t* in_side_a, int32_t* keep, int32_t* src,
                 int32_t* dst, const Ahead ahead, int* done, bool qkv_is_there) {
  extern __shared__ __align__(16) unsigned char shared[];
  const auto floats = [&](int offset) { return reinterpret_cast<float*>(shared + offset); };
  const auto longs = [&](int offset) { return reinterpret_cast<uint64_t*>(shared + offset); };
  const auto shorts = [&](int offset) { return reinterpret_cast<uint16_t*>(shared + offset); };
  const bool vouches = done != nullptr && !qkv_is_there;  // for qkv, to attention
  if (!vouches) admit_next();
  const int rank = int(blockIdx.x) % shape.cluster, cluster = shape.cluster;
  const int64_t image = int(blockIdx.x) / shape.cluster;
  uint16_t *list_a = shorts(at.list_a), *list_b = shorts(at.list_b);
  const Counts counts = list_sides(shape, in_side_a, list_a, list_b);
#pragma unroll
  for (const auto& parameters : ahead.parameters)
    if (parameters.data != nullptr) fetch_ahead(parameters.data, parameters.count);
  if (!qkv_is_there) await_earlier();
  if (vouches) admit_next();

  if (shape.r > 0 && counts.b > 0) {
    const int share = (counts.a + cluster - 1) / cluster;
    const int own_first = min(rank * share, counts.a), own_last = min(own_first + share, counts.a);
    const bool all_b_fits = counts.b <= shape.columns;
    uint64_t* best = longs(at.best);
    float* scale = floats(at.scale);
    // Chunks are counted by the share, the same in every block of the cluster: their barriers must agree.
    for (int chunk = 0; chunk < share; chunk += shape.rows) {
      const int first_a = own_first + chunk, count_a = max(0, min(shape.rows, own_last - first_a));
      for (int row = int(threadIdx.x); row < count_a; row += kThreads) best[row] = kNoPartner;
      for (int first_b = 0; first_b < counts.b; first_b += shape.columns) {
        const int count_b = min(shape.columns, counts.b - first_b);
        const int fresh_a = first_b == 0 ? count_a : 0, fresh_b = all_b_fits && chunk > 0 ? 0 : count_b;
        const int share_b = (fresh_b + cluster - 1) / cluster;
        const int skipped_b = min(rank * share_b, fresh_b), own_b = min(share_b, fresh_b - skipped_b);
        float* b = floats(at.b) + skipped_b * pitch_of(shape.keys.dim);
        arrive(cluster);
        load_metric(qkv, shape.keys, image * shape.keys.tokens, list_a + first_a, fresh_a, list_b + first_b + skipped_b,
                    own_b, floats(at.a), b);
        __syncthreads();
        await_arrivals(cluster);  // every block has started, and none reads the last chunk any more
        normalise(shape.keys, floats(at.a), fresh_a, scale, b, own_b, rank, cluster);
        barrier(cluster);
        search<kRows, kColumns>(shape, floats(at.a), count_a, floats(at.b), count_b, first_b, longs(at.partial), best);
      }
      for (int row = int(threadIdx.x); row < count_a; row += kThreads) {
        float score = score_of(best[row]);
        if (score != -INFINITY) score *= scale[row];
        of_block(longs(at.order), 0, cluster)[first_a + row] = sort_key(score, first_a + row);
        of_block(shorts(at.column), 0, cluster)[first_a + row] = uint16_t(column_of(best[row]));
      }
    }
    barrier(cluster);
  }
  if (rank == 0) {
    write_plan(shape, counts, longs(at.order), shorts(at.column), list_a, list_b,
               reinterpret_cast<uint32_t*>(shared + at.leaves), reinterpret_cast<uint32_t*>(shared + at.partial),
               keep + image * (shape.keys.tokens - shape.r), src + image * shape.r, dst + image * shape.r);
    report_block(done);
  }
  if (qkv_is_there) await_earlier();  // so that what waits for this launch has waited for the one in front
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    key_mean_kernel(const T* qkv, Keys keys, int64_t tokens_of_batch, float* out) {
  const int chunks = keys.dim / kChunk<T>;
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= tokens_of_batch * chunks) return;
  const int64_t token = item / chunks;
  const int d = int(item - token * chunks) * kChunk<T>;
  float mean[kChunk<T>];
  head_mean(key_of(qkv, keys, token) + d, keys, mean);
  store_chunk(out + token * keys.dim + d, mean);
}

Keys checked_keys(const char* what, const void* qkv, int batch, int tokens, int heads, int head_dim) {
  if (batch < 0 || tokens < 1 || heads < 1 || head_dim < 8 || head_dim % 8 != 0) {
    fail(ExitCode::usage, what, ": qkv of ", batch, " x ", tokens, " tokens, ", heads, " heads of ", head_dim,
         "; expected at least one token and head, and a head dimension that is a multiple of 8");
  }
  if (batch > 0 && (!qkv || reinterpret_cast<uintptr_t>(qkv) % 16 != 0)) {
    fail(ExitCode::usage, what, ": qkv must be 16-byte aligned device memory");
  }
  return {tokens, heads, head_dim, 1.0f / float(heads)};
}

/// The largest chunks of both sides that fit: all of both at the usual shapes.
Layout fit(Shape& shape, int tile_rows, int tile_columns, int most_a, int most_b) {
  shape.rows = std::max(8, round_up((most_a + shape.cluster - 1) / shape.cluster, 8));
  shape.columns = std::max(8, round_up(most_b, 8));
  const size_t limit = shared_memory_limit();
  for (;;) {
    shape.slots = std::min(kThreads, (shape.rows / tile_rows) * (shape.columns / tile_columns));
    const Layout at = lay_out(shape, tile_rows, most_a, most_b);
    // 64: what list_sides holds in static shared memory counts towards the limit.
    if (size_t(at.bytes) + 64 <= limit) return at;
    if (shape.rows == 8 && shape.columns == 8) {
      fail(ExitCode::device, "match: ", shape.keys.tokens, " tokens need ", at.bytes,
           " bytes of shared memory; this device has ", limit, " a block");
    }
    (shape.rows >= shape.columns ? shape.rows : shape.columns) -= 8;
  }
}

Counts checked_sides(const MatchCall& call) {
  const int others = call.tokens - call.protected_tokens;
  if (call.tokens > kMostTokens || call.head_dim > kMostDim || call.protected_tokens < 0 || others < 0) {
    fail(ExitCode::usage, "match: ", call.tokens, " tokens, ", call.protected_tokens, " of them protected, of ",
         call.head_dim, "; expected up to ", kMostTokens, " tokens of up to ", kMostDim);
  }
  const Counts most = call.in_side_a ? Counts{others, others} : alternating(call.tokens, call.protected_tokens);
  if (call.r < 0 || call.r > (most.b == 0 ? 0 : most.a)) {
    fail(ExitCode::usage, "match: r is ", call.r, "; expected 0 to ", most.b == 0 ? 0 : most.a, " for ", call.tokens,
         " tokens");
  }
  if (call.batch > 0 && ((call.tokens > call.r && !call.keep) || (call.r > 0 && (!call.src || !call.dst)))) {
    fail(ExitCode::usage, "match: keep, src and dst must be device memory");
  }
  return most;
}

template <class T, int kRows, int kColumns>
void launch(const MatchCall& call, Shape shape, Counts most, cudaStream_t stream) {
  const Layout at = fit(shape, kRows, kColumns, most.a, most.b);
  Ahead ahead;
  std::ranges::copy(call.ahead, ahead.parameters);
  launch_dependent<&match_kernel<T, kRows, kColumns>>(
      {dim3(unsigned(call.batch * shape.cluster)), kSearchThreads, size_t(at.bytes), shape.cluster}, stream,
      static_cast<const T*>(call.qkv), shape, at, call.in_side_a, call.keep, call.src, call.dst, ahead, call.done,
      call.qkv_is_there);
}

}  // namespace

void match_bipartite(const MatchCall& call, cudaStream_t stream) {
  constexpr int kTokensOfBlock = 16, kBusyTiles = 64;
  Shape shape{};
  shape.keys = checked_keys("match", call.qkv, call.batch, call.tokens, call.heads, call.head_dim);
  shape.r = call.r;
  shape.protected_tokens = call.protected_tokens;
  const Counts most = checked_sides(call);
  if (call.batch == 0) return;
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    const Device device = device_for<&match_kernel<T, 4, 4>>();
    shape.cluster = call.r == 0 ? 1 : cluster_size(device, call.batch, call.tokens, kTokensOfBlock);
    const int rows = (most.a + shape.cluster - 1) / shape.cluster;
    const auto tiles = [&](int tile_rows, int tile_columns) {
      return ((rows + tile_rows - 1) / tile_rows) * ((most.b + tile_columns - 1) / tile_columns);
    };
    // The larger a tile, the fewer reads of shared memory; but with few tiles more threads are worth more.
    if (tiles(8, 8) >= kBusyTiles) return launch<T, 8, 8>(call, shape, most, stream);
    if (tiles(2, 2) <= kThreads) return launch<T, 2, 2>(call, shape, most, stream);
    if (tiles(2, 4) <= kThreads) return launch<T, 2, 4>(call, shape, most, stream);
    launch<T, 4, 4>(call, shape, most, stream);
  });
}

void key_mean(const void* qkv, DType dtype, int batch, int tokens, int heads, int head_dim, float* out,
              cudaStream_t stream) {
  const Keys keys = checked_keys("key_mean", qkv, batch, tokens, heads, head_dim);
  if (batch == 0) return;
  if (!out || reinterpret_cast<uintptr_t>(out) % 16 != 0) {
    fail(ExitCode::usage, "key_mean: out must be 16-byte aligned device memory");
  }
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t rows = int64_t(batch) * tokens, items = rows * (head_dim / kChunk<T>);
    const unsigned blocks = unsigned((items + kThreads - 1) / kThreads);
    key_mean_kernel<T><<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(qkv), keys, rows, out);
    PYRA_CUDA_LAUNCHED();
  });
}

}  // namespace pyra::kernels::cuda
