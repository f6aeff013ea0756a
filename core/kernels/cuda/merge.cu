// Token merging: gather, PYRA's gate, reduction, new sizes and the LayerNorm that follows, in one kernel.
//
// A block owns a slice of an image's output tokens, a warp one of them at a time, a lane its vectors of channels
// (row.cuh). The launch picks how many slices an image is cut into; no sum knows of it.
// With a gate every block first computes the gates of its whole image: w1 adds up over all pairs, and to recompute them
// from L2 should cost a small batch less than a second launch, a large one (a slice is an image then) nothing. A round
// takes kSlots pairs, a warp one of them: it leaves a[i] p in shared memory (p: the pair's normalised sum) and keeps
// w2[i], then every thread adds the round's rows to the channels it owns, in the plan's order. LayerNorm's weight and
// bias come in once an image, not once a pair (share_gate_terms). Then each warp finds the sources of its output token
// by ballots over dst (ascending, the plan's order again) and adds them.
// Where images are few the blocks are lone ones (Shape), as many as give each some 8 rows. One image of 197 tokens, 39
// of them merged (H200, clock64 of the first block): 14.6 k cycles, of which the plan takes 1.8, gates 10.0, rows 2.7;
// 19.5 k by the blocks for many images. Of the gates' time half is issuing some 300 instructions a pair.
// Tried and lost: reading a round's or a source's rows ahead of their turn into registers, which spill, or halve the
// warps whose loads are in flight; and by cp.async into two rows of shared memory a warp, with a warp's sums of a[i]
// P[i] in registers instead of rounds (H200, ViT-B, 256 images, all merges of a pass: high 0.84 ms for 0.73, low 1.15
// for 1.03): the way through shared memory costs more than the wait that it hides, with 24 warps to switch between.
// The gates shared by a cluster of an image's blocks, sums passed through distributed shared memory (23 % fewer rows to
// read at the high schedule), and with or without it: rows with sources first and dealt to warps as they come, the next
// row asked into L2 or L1, the plan staged with one wait instead of three (lone blocks, which came later, have the last
// two): 0.83 to 0.85 ms for 0.75 (high), 1.13
// for 1.03 (low), and for one image 1 571 to 1 670 images/s for 1 714. Nor does the whole pass gain by it (42 091 to 42
// 684 images/s for 41 943, within what a repeated run differs by).
//
// Bytes moved: K + R tokens read (the gate's R and their destinations once more, from L2 in the main), K written twice.
#include "kernels/cuda/merge.h"

#include <algorithm>

#include "kernels/cuda/dependent.cuh"
#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kSlotFloats = 12 << 10;  // two blocks of 48 KB and their plans fit a multiprocessor

/// What an instance of the kernel is made of: element types, values of a row in a lane, and whether blocks are so few
/// that each has a multiprocessor of its own. Then latencies decide: twice the warps, and the image's keep and sizes
/// staged beside the plan, for one wait instead of three.
template <class Residual_, class Compute_, class Row, bool kLone_>
struct Shape {
  using Residual = Residual_;
  using Compute = Compute_;
  static constexpr int kValues = Row::kValues;
  static constexpr int kWidth = kVectorOf<Residual, Compute>;
  static constexpr int kChunks = kValues / kWidth;
  static constexpr int kPositions = kValues * kWarp;  // channels, padded
  // Registers decide: a lane holds a row in fp32 and another as it comes. 64, 80, 168 or 255 of them.
  static constexpr int kHeld = kValues + kValues * int(sizeof(Residual)) / 4;
  static constexpr bool kLone = kLone_;
  static constexpr int kShared = kHeld <= 48 ? 2 : 1;  // blocks on a multiprocessor, if many
  static constexpr int kBlocks = kLone ? 1 : kShared;
  static constexpr int kWarps = (kHeld <= 36 ? 16 : kHeld <= 96 ? 12 : 8) * kShared / kBlocks;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kMostSlots = kSlotFloats * kShared / kBlocks / kPositions;
  static constexpr int kSlots = kMostSlots < kWarps ? kMostSlots : kWarps;
  using Vector = Words<Residual, kWidth>;
  [[nodiscard]] __device__ __forceinline__ static int channels(const MergeCall& call) {
    return Row::channels(call.channels);
  }
  using Raw = RawRow<Residual, kValues, kWidth>;
};

/// A block's shared memory: arrays of the image's plan, keep of the slice, and with a gate rows in the order of
/// `position`. Addresses follow from two numbers, so that they cost no registers.
template <class S>
struct Shared {
  float* memory;
  int merged, slice;  ///< of a lone block: kept, all of it

  static constexpr int kArrays = 8;
  [[nodiscard]] static size_t bytes(const MergeCall& call, int slice) {
    const size_t rows = call.gate_a == nullptr ? 0 : size_t(S::kSlots + 2) * S::kPositions + 4;
    return 4 * (size_t(rows_at(call.merged, slice)) + rows + (S::kLone ? size_t(call.tokens) : 0));
  }
  [[nodiscard]] __host__ __device__ static int rows_at(int merged, int slice) {
    return (kArrays * merged + slice + 3) & ~3;
  }
  __device__ float* source_unit() const { return memory; }                            // [R] u of the source
  __device__ float* destination_unit() const { return memory + merged; }              // [R] u of the destination
  __device__ float* weight() const { return memory + 2 * merged; }                    // [R] src_weight u
  __device__ float* growth() const { return memory + 3 * merged; }                    // [R] added to the size
  __device__ float* token_gate() const { return memory + 4 * merged; }                // [R] w2
  __device__ int* source_token() const { return ints(5); }                            // [R] src
  __device__ int* destination_token() const { return ints(6); }                       // [R] keep[dst]
  __device__ int* destination() const { return ints(7); }                             // [R] dst
  __device__ int* kept() const { return ints(8); }                                    // [slice] keep
  __device__ float* channel_gate() const { return memory + rows_at(merged, slice); }  // [kPositions] w1
  __device__ float* gate_weight_b() const { return channel_gate() + S::kPositions; }  // [kPositions] weight b
  __device__ float* gate_row(int slot) const {                                        // [kSlots][kPositions] a[i] p
    return gate_weight_b() + (slot + 1) * S::kPositions;
  }
  __device__ float* gate_sums() const { return gate_row(S::kSlots); }  // sum of bias b, sum of a
  __device__ float* image_sizes(bool gated) const {                    // [tokens], of a lone block
    return gated ? gate_sums() + 4 : channel_gate();
  }

 private:
  __device__ int* ints(int array) const { return reinterpret_cast<int*>(memory + array * merged); }
};

/// Where a lane's vector of 4 values stands in a row in shared memory: a warp's accesses of 16 bytes are contiguous.
__device__ __forceinline__ int position(int quad, int lane) {
  return (quad * kWarp + lane) * 4;
}

/// 2 sigmoid(x) - 1, exactly 0 at 0: where b is 0 the gate is none, bit for bit.
__device__ __forceinline__ float gate_of(float x) {
  return tanhf(__fmul_rn(0.5f, x));
}

template <class S>
__device__ __forceinline__ const typename S::Residual* row_of(const MergeCall& call, int image, int token) {
  return static_cast<const typename S::Residual*>(call.x) + (int64_t(image) * call.tokens + token) * S::channels(call);
}

__device__ __forceinline__ float size_of_token(const MergeCall& call, int image, int token) {
  return call.sizes ? call.sizes[int64_t(image) * call.tokens + token] : 1.0f;
}

/// The image's plan and the slice's part of `keep` to shared memory; a lone block's `keep` and sizes have come before.
template <class S>
__device__ __forceinline__ void stage_plan(const MergeCall& call, int image, const Shared<S>& s, int begin, int end) {
  const int64_t pairs = int64_t(image) * call.merged, kept = int64_t(image) * call.kept;
  const auto size_of = [&](int token) {
    return S::kLone ? s.image_sizes(call.gate_a != nullptr)[token] : size_of_token(call, image, token);
  };
#pragma unroll 1
  for (int i = threadIdx.x; i < call.merged; i += S::kThreads) {
    const int token = call.src[pairs + i], destination = call.dst[pairs + i];
    const float size = size_of(token), unit = call.weighted ? size : 1.0f;
    s.source_token()[i] = token;
    s.destination()[i] = destination;
    s.weight()[i] = call.src_weight ? __fmul_rn(call.src_weight[pairs + i], unit) : unit;
    s.growth()[i] = call.src_size_scale ? __fmul_rn(size, fmaxf(0.0f, call.src_size_scale[pairs + i])) : size;
    if (!call.gate_a) continue;
    const int receiver = S::kLone ? s.kept()[destination] : call.keep[kept + destination];
    s.source_unit()[i] = unit;
    s.destination_token()[i] = receiver;
    s.destination_unit()[i] = call.weighted ? size_of(receiver) : 1.0f;
  }
  if constexpr (!S::kLone) {
#pragma unroll 1
    for (int k = begin + int(threadIdx.x); k < end; k += S::kThreads) s.kept()[k - begin] = call.keep[kept + k];
  }
}

/// All of `keep` and the sizes of a lone block's image.
template <class S>
__device__ __forceinline__ void stage_image(const MergeCall& call, int image, const Shared<S>& s) {
  float* sizes = s.image_sizes(call.gate_a != nullptr);
  for (int i = threadIdx.x; i < call.tokens; i += S::kThreads) {
    sizes[i] = size_of_token(call, image, i);
    if (i < call.kept) s.kept()[i] = call.keep[int64_t(image) * call.kept + i];
  }
}

/// The channel of a lane's quad of values; beyond the row where the vector is.
template <class S>
__device__ __forceinline__ int channel_of(int quad, int lane) {
  constexpr int kQuadsOfVector = S::kWidth / 4;
  return (quad / kQuadsOfVector * kWarp + lane) * S::kWidth + quad % kQuadsOfVector * 4;
}

/// What the gates of all pairs share, by one warp, from parameters alone, so it may run before await_earlier(). With
/// P = p weight + bias, p the pair's normalised sum, w2's product P b is p (weight b) + bias b, and w1's sum over pairs
/// weight sum(a p) + bias sum(a): a pair reads one row of parameters instead of three.
template <class S>
__device__ __forceinline__ void share_gate_terms(const MergeCall& call, const Shared<S>& s, int lane) {
  float product = 0, sum = 0;
#pragma unroll
  for (int quad = 0; quad < S::kValues / 4; ++quad) {
    pace<S::kValues>(quad);
    const int c = channel_of<S>(quad, lane);
    float weight[4] = {}, bias[4] = {}, b[4] = {};
    if (c < S::channels(call)) {
      load_floats<float, 4>(call.gate_weight + c, weight);
      load_floats<float, 4>(call.gate_bias + c, bias);
      load_floats<float, 4>(call.gate_b + c, b);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      product = __fmaf_rn(bias[e], b[e], product);
      weight[e] = __fmul_rn(weight[e], b[e]);
    }
    store_floats<float, 4>(s.gate_weight_b() + position(quad, lane), weight);
  }
  for (int i = lane; i < call.merged; i += kWarp) sum = __fadd_rn(sum, call.gate_a[i]);
  product = warp_sum(product);
  sum = warp_sum(sum);
  if (lane == 0) s.gate_sums()[0] = product, s.gate_sums()[1] = sum;
}

/// A warp's pair i: a[i] p to `slot`, w2[i]. p = u_src x_src + u_dst x_dst, normalised.
template <class S>
__device__ __forceinline__ void gate_pair(const MergeCall& call, int image, const Shared<S>& s, int i, float* slot,
                                          int lane) {
  constexpr int kWidth = S::kWidth;
  const auto *source = row_of<S>(call, image, s.source_token()[i]),
             *destination = row_of<S>(call, image, s.destination_token()[i]);
  const float u = s.source_unit()[i], v = s.destination_unit()[i];
  float p[S::kValues];
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) {
    pace<S::kValues>(j);
    const int c = (j * kWarp + lane) * kWidth, from = c < S::channels(call) ? c : 0;
    const auto x = S::Vector::read(source + from), y = S::Vector::read(destination + from);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) p[j * kWidth + e] = __fmaf_rn(u, x.value(e), __fmul_rn(v, y.value(e)));
  }
  normalise<kWidth>(p, S::channels(call), call.gate_eps, lane);
  const float a = call.gate_a[i];
  float product = 0;
#pragma unroll
  for (int quad = 0; quad < S::kValues / 4; ++quad) {
    pace<S::kValues>(quad);
    float weight_b[4], row[4];
    load_floats<float, 4>(s.gate_weight_b() + position(quad, lane), weight_b);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      product = __fmaf_rn(p[quad * 4 + e], weight_b[e], product);
      row[e] = __fmul_rn(a, p[quad * 4 + e]);
    }
    store_floats<float, 4>(slot + position(quad, lane), row);
  }
  product = __fadd_rn(warp_sum(product), s.gate_sums()[0]);
  if (lane == 0) s.token_gate()[i] = gate_of(product);
}

/// w1 and w2 of the image into shared memory. Ends with a barrier.
template <class S>
__device__ __forceinline__ void compute_gates(const MergeCall& call, int image, const Shared<S>& s, int warp,
                                              int lane) {
  constexpr int kOwned = (S::kPositions + S::kThreads - 1) / S::kThreads;
  float sum[kOwned] = {};
#pragma unroll 1
  for (int base = 0; base < call.merged; base += S::kSlots) {
    const int count = min(S::kSlots, call.merged - base);
    // No loop around this: the compiler would read rows ahead of it, and spill.
    if (warp < count) gate_pair<S>(call, image, s, base + warp, s.gate_row(warp), lane);
    __syncthreads();
#pragma unroll(S::kLone ? 8 : 2)
    for (int j = 0; j < count; ++j) {
#pragma unroll
      for (int n = 0; n < kOwned; ++n) {
        const int own = n * S::kThreads + threadIdx.x;
        if (own < S::kPositions) sum[n] = __fadd_rn(sum[n], s.gate_row(j)[own]);
      }
    }
    __syncthreads();  // the next round writes over these rows
  }
#pragma unroll
  for (int n = 0; n < kOwned; ++n) {
    const int own = n * S::kThreads + threadIdx.x;
    const int c = channel_of<S>(own / 4 / kWarp, own / 4 % kWarp) + own % 4;
    if (own < S::kPositions && c < S::channels(call)) {
      const float total = __fmaf_rn(call.gate_weight[c], sum[n], __fmul_rn(call.gate_bias[c], s.gate_sums()[1]));
      s.channel_gate()[own] = __fadd_rn(1.0f, gate_of(total));
    }
  }
  __syncthreads();
}

/// The sources of output token k in ascending order, by the whole warp; -1 after the last.
class Sources {
 public:
  __device__ Sources(const int* destination, int merged, int k, int lane)
      : destination_(destination), merged_(merged), k_(k), lane_(lane) {}
  __device__ __forceinline__ int next() {
    while (mask_ == 0) {
      base_ += kWarp;
      if (base_ >= merged_) return -1;
      const int i = base_ + lane_;
      mask_ = __ballot_sync(kAllLanes, i < merged_ && destination_[i] == k_);
    }
    const int bit = __ffs(int(mask_)) - 1;
    mask_ &= mask_ - 1;
    return base_ + bit;
  }

 private:
  const int* destination_;
  int merged_, k_, lane_, base_ = -kWarp;
  unsigned mask_ = 0;
};

/// row += S'[i] w / divisor. In this order a gate of 1 leaves the factor, and so the sum, as without a gate.
template <class S>
__device__ __forceinline__ void add_source(const MergeCall& call, int image, const Shared<S>& s, int i, float divisor,
                                           float (&row)[S::kValues], int lane) {
  constexpr int kWidth = S::kWidth;
  const auto* source = row_of<S>(call, image, s.source_token()[i]);
  const float share = quotient(s.weight()[i], divisor), w2 = call.gate_a ? s.token_gate()[i] : 0.0f;
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) {
    pace<S::kValues>(j);
    const int c = (j * kWarp + lane) * kWidth;
    const auto x = S::Vector::read(source + (c < S::channels(call) ? c : 0));
#pragma unroll
    for (int q = 0; q < kWidth / 4; ++q) {
      float factor[4] = {share, share, share, share};
      if (call.gate_a) {
        float w1[4];
        load_floats<float, 4>(s.channel_gate() + position(j * kWidth / 4 + q, lane), w1);
#pragma unroll
        for (int e = 0; e < 4; ++e) factor[e] = __fmul_rn(share, __fmaf_rn(w1[e], w2, 1.0f));
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& sum = row[j * kWidth + q * 4 + e];
        sum = __fmaf_rn(x.value(q * 4 + e), factor[e], sum);
      }
    }
  }
}

/// Brings a row that a warp will read near.
template <class S>
__device__ __forceinline__ void fetch_row(const typename S::Residual* row, int channels, int lane) {
  constexpr int kLine = 128 / sizeof(typename S::Residual);
  for (int c = lane * kLine; c < channels; c += kWarp * kLine) asm volatile("prefetch.global.L1 [%0];" ::"l"(row + c));
}

/// Output token k of the image, by a warp: x_out, sizes_out and y.
template <class S>
__device__ __forceinline__ void merge_row(const MergeCall& call, int image, const Shared<S>& s, int k, int token,
                                          int lane) {
  using T = typename S::Residual;
  using Y = typename S::Compute;
  typename S::Raw raw;
  raw.load(row_of<S>(call, image, token), S::channels(call), lane);
  const float size = size_of_token(call, image, token), unit = call.weighted ? size : 1.0f;
  float divisor = unit, grown = size;
  Sources find(s.destination(), call.merged, k, lane);
  const int first = find.next();
  for (int i = first; i >= 0; i = find.next()) {
    if constexpr (S::kLone) fetch_row<S>(row_of<S>(call, image, s.source_token()[i]), S::channels(call), lane);
    divisor = __fadd_rn(divisor, s.weight()[i]);
    grown = __fadd_rn(grown, s.growth()[i]);
  }
  const int64_t output = int64_t(image) * call.kept + k, to = output * S::channels(call);
  T* x_out = static_cast<T*>(call.x_out) + to;
  if (lane == 0) call.sizes_out[output] = grown;

  float rows[1][S::kValues];
  auto& row = rows[0];
  if (first < 0) {
    raw.store(x_out, S::channels(call), lane);
#pragma unroll
    for (int v = 0; v < S::kValues; ++v) row[v] = raw.value(v);
  } else {
    const float share = quotient(unit, divisor);
#pragma unroll
    for (int v = 0; v < S::kValues; ++v) row[v] = __fmul_rn(raw.value(v), share);
    Sources again(s.destination(), call.merged, k, lane);
    for (int i = again.next(); i >= 0; i = again.next()) add_source<S>(call, image, s, i, divisor, row, lane);
    store_row<T, S::kWidth>(x_out, row, S::channels(call), lane);
  }
  const float inverse = normalise<S::kWidth>(row, S::channels(call), call.norm_eps, lane);
  if (call.normalised) {
    store_row<Y, S::kWidth>(static_cast<Y*>(call.normalised) + to, row, S::channels(call), lane);
    if (lane == 0) call.inverse_deviation[output] = inverse;
  }
  store_affine<Y, S::kWidth>(rows, call.norm_weight, call.norm_bias, S::channels(call), lane,
                             static_cast<Y*>(call.y) + to, 0);
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) merge_kernel(const MergeCall call, int slice) {
  extern __shared__ float4 memory[];
  const bool gated = call.gate_a != nullptr;
  const int image = int(blockIdx.y);
  const int begin = int(blockIdx.x) * slice, end = min(call.kept, begin + slice);
  const Shared<S> s{reinterpret_cast<float*>(memory), call.merged, S::kLone ? call.kept : slice};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  fetch_ahead(call.norm_weight, S::channels(call));
  fetch_ahead(call.norm_bias, S::channels(call));
  if (gated && warp == S::kWarps - 1) share_gate_terms<S>(call, s, lane);
  admit_next();
  await_earlier();
  if constexpr (S::kLone) {
    stage_image<S>(call, image, s);
    __syncthreads();
  }
  stage_plan<S>(call, image, s, begin, end);
  __syncthreads();
  if (gated) compute_gates<S>(call, image, s, warp, lane);
#pragma unroll 1
  for (int k = begin + warp; k < end; k += S::kWarps)
    merge_row<S>(call, image, s, k, s.kept()[S::kLone ? k : k - begin], lane);
}

/// Blocks of an image: the cut of images that fills the multiprocessors' rounds of blocks with the least work,
/// counted in rows; every block of a gated image pays for R pairs, some two rows from L2.
template <class S>
int slices_of(const MergeCall& call) {
  const int64_t room = int64_t(multiprocessors()) * S::kBlocks;
  const int most = (call.kept + S::kWarps - 1) / S::kWarps;
  int64_t best = 0;
  int chosen = 1;
  for (int slices = 1; slices <= most; ++slices) {
    const int slice = (call.kept + slices - 1) / slices;
    const int64_t rounds = (call.batch * int64_t(slices) + room - 1) / room;
    const int64_t work = rounds * (slice + (call.gate_a ? call.merged : 0));
    if (slices > 1 && work >= best) continue;
    best = work;
    chosen = slices;
  }
  return chosen;
}

template <class S>
void launch(const MergeCall& call, int slices, cudaStream_t stream) {
  const int slice = (call.kept + slices - 1) / slices, blocks = (call.kept + slice - 1) / slice;
  const size_t bytes = Shared<S>::bytes(call, S::kLone ? call.kept : slice), limit = shared_memory_limit();
  if (bytes > limit)
    fail(ExitCode::device, "merge: a plan of ", call.merged, " pairs of ", call.channels, " channels needs ", bytes,
         " bytes of shared memory; this device has ", limit);
  if (bytes > (48u << 10))
    PYRA_CUDA(cudaFuncSetAttribute(merge_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  launch_dependent<&merge_kernel<S>>({dim3(unsigned(blocks), unsigned(call.batch)), S::kThreads, bytes}, stream, call,
                                     slice);
}

/// By lone blocks where these are no more than multiprocessors and their memory suffices.
template <class Residual, class Compute, class Row>
void launch(const MergeCall& call, cudaStream_t stream) {
  using Lone = Shape<Residual, Compute, Row, true>;
  using Many = Shape<Residual, Compute, Row, false>;
  constexpr int kRowsWanted = 8;  // of a block: in a whole pass of one image 24 cost 2 % more
  const int room = multiprocessors() / call.batch;
  const int blocks = std::min(room, (call.kept + kRowsWanted - 1) / kRowsWanted);
  if (blocks * Lone::kWarps >= call.kept && Shared<Lone>::bytes(call, call.kept) <= shared_memory_limit())
    return launch<Lone>(call, blocks, stream);
  launch<Many>(call, slices_of<Many>(call), stream);
}

void check(const MergeCall& call) {
  constexpr const char* kWho = "merge";
  check_channels(kWho, call.channels);
  check_dtype(kWho, call.residual);
  check_dtype(kWho, call.compute);
  if (call.residual != DType::fp32 && call.residual != call.compute)
    fail(ExitCode::usage, kWho, ": a residual stream of 16 bits must be of the type computed in");
  if (call.batch < 0 || call.batch > 65535 || call.tokens < 1 || call.kept < 1 || call.merged < 0 ||
      call.merged > call.tokens - call.kept)
    fail(ExitCode::usage, kWho, ": ", call.tokens, " tokens, of which ", call.kept, " stay and ", call.merged,
         " are merged, in ", call.batch, " images");
  if (call.batch == 0) return;
  check_pointer(kWho, "x", call.x);
  check_pointer(kWho, "x_out", call.x_out);
  check_pointer(kWho, "y", call.y);
  check_pointer(kWho, "norm_weight", call.norm_weight);
  check_pointer(kWho, "norm_bias", call.norm_bias);
  if (call.x_out == call.x) fail(ExitCode::usage, kWho, ": x_out is x");
  if (!call.keep || !call.sizes_out || (call.merged > 0 && (!call.src || !call.dst)))
    fail(ExitCode::usage, kWho, ": keep, src, dst or sizes_out is null");
  if (!call.gate_a) return;
  check_pointer(kWho, "gate_b", call.gate_b);
  check_pointer(kWho, "gate_weight", call.gate_weight);
  check_pointer(kWho, "gate_bias", call.gate_bias);
}

}  // namespace

void merge_tokens(const MergeCall& given, cudaStream_t stream) {
  MergeCall call = given;
  if (call.merged == 0) call.gate_a = nullptr;  // a gate that opens for no token is no gate
  check(call);
  if (call.batch == 0) return;
  with_row_shape(call.channels, [&](auto row) {
    using Row = decltype(row);
    with_type(call.compute, [&](auto compute) {
      using Compute = decltype(compute);
      if (call.residual == DType::fp32) return launch<float, Compute, Row>(call, stream);
      launch<Compute, Compute, Row>(call, stream);
    });
  });
}

}  // namespace pyra::kernels::cuda
