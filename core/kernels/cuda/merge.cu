// Token merging: gather, PYRA's gate, reduction, new sizes and the LayerNorm that follows, in one kernel.
//
// A block owns a slice of an image's output tokens, a warp one of them at a time, a lane its vectors of channels
// (row.cuh). The launch picks how many slices an image is cut into; no sum knows of it.
// With a gate every block first computes the gates of its whole image: w1 adds up over all pairs, and to recompute them
// from L2 should cost a small batch less than a second launch, a large one (a slice is an image then) nothing. A warp
// takes every kWarps-th pair, keeps its w2[i] and the sum of its a[i] P[i]; the warps' sums are added in their order.
// Then each warp finds the sources of its output token by ballots over dst (ascending, the plan's order) and adds them.
//
// A warp has two rows of shared memory, into which the rows of its next pair, or its next token and that token's first
// source, are copied asynchronously while it works on the last: what it waits for is asked a row's work ahead. Every
// lane reads what it copied itself, so no barrier stands between. Reading ahead into registers was given up: they
// spill, or halve the warps whose loads are in flight.
//
// Bytes moved: K + R tokens read (the gate's R and their destinations once more, from L2 in the main), K written twice.
#include "kernels/cuda/merge.h"

#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kRowFloats = 22 << 10;  // the warps' rows: two blocks fit a multiprocessor of 164 KB, one that of 99 KB

/// What an instance of the kernel is made of: element types, values of a row in a lane.
template <class Residual_, class Compute_, class Row>
struct Shape {
  using Residual = Residual_;
  using Compute = Compute_;
  static constexpr int kValues = Row::kValues;
  static constexpr int kWidth = kVectorOf<Residual, Compute>;
  static constexpr int kChunks = kValues / kWidth;
  static constexpr int kPositions = kValues * kWarp;  // channels, padded
  [[nodiscard]] static constexpr bool fits(int warps) { return (2 * warps + 1) * kPositions <= kRowFloats; }
  static constexpr int kWarps = fits(16) ? 16 : fits(12) ? 12 : fits(8) ? 8 : fits(6) ? 6 : fits(4) ? 4 : 2;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kBlocks = kValues <= 48 ? 2 : 1;  // by their registers
  static_assert(kWidth * sizeof(Residual) == 16, "a lane reads the vectors that it copied");
  using Vector = Words<Residual, kWidth>;
  [[nodiscard]] __device__ __forceinline__ static int channels(const MergeCall& call) {
    return Row::channels(call.channels);
  }
};

/// A block's shared memory: arrays of the image's plan and of the slice, w1 in the order of `position`, two rows a
/// warp. Addresses follow from two numbers, so that they cost no registers.
template <class S>
struct Shared {
  float* memory;
  int merged, slice;

  static constexpr int kArrays = 8;
  [[nodiscard]] static size_t bytes(int merged, int slice) {
    return 4 * (size_t(rows_at(merged, slice)) + size_t(2 * S::kWarps + 1) * S::kPositions);
  }
  [[nodiscard]] __host__ __device__ static int rows_at(int merged, int slice) {
    return (kArrays * merged + 2 * slice + 3) & ~3;
  }
  __device__ float* source_unit() const { return memory; }                            // [R] u of the source
  __device__ float* destination_unit() const { return memory + merged; }              // [R] u of the destination
  __device__ float* weight() const { return memory + 2 * merged; }                    // [R] src_weight u
  __device__ float* growth() const { return memory + 3 * merged; }                    // [R] added to the size
  __device__ float* token_gate() const { return memory + 4 * merged; }                // [R] w2
  __device__ int* source_token() const { return ints(5 * merged); }                   // [R] src
  __device__ int* destination_token() const { return ints(6 * merged); }              // [R] keep[dst]
  __device__ int* destination() const { return ints(7 * merged); }                    // [R] dst
  __device__ int* kept() const { return ints(8 * merged); }                           // [slice] keep
  __device__ float* kept_size() const { return memory + 8 * merged + slice; }         // [slice] its size
  __device__ float* channel_gate() const { return memory + rows_at(merged, slice); }  // [kPositions] 1 + gate, w1
  /// Of a warp: 0 for the pair's source and the kept token, 1 for the pair's destination and the token's first source.
  __device__ float* row(int warp, int which) const { return channel_gate() + (1 + 2 * warp + which) * S::kPositions; }

 private:
  __device__ int* ints(int at) const { return reinterpret_cast<int*>(memory + at); }
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

/// The image's plan and the slice's part of `keep` to shared memory.
template <class S>
__device__ __forceinline__ void stage_plan(const MergeCall& call, int image, const Shared<S>& s, int begin, int end) {
  const int64_t pairs = int64_t(image) * call.merged, kept = int64_t(image) * call.kept;
#pragma unroll 1
  for (int i = threadIdx.x; i < call.merged; i += S::kThreads) {
    const int token = call.src[pairs + i], destination = call.dst[pairs + i];
    const float size = size_of_token(call, image, token), unit = call.weighted ? size : 1.0f;
    s.source_token()[i] = token;
    s.destination()[i] = destination;
    s.weight()[i] = call.src_weight ? __fmul_rn(call.src_weight[pairs + i], unit) : unit;
    s.growth()[i] = call.src_size_scale ? __fmul_rn(size, call.src_size_scale[pairs + i]) : size;
    if (!call.gate_a) continue;
    const int receiver = call.keep[kept + destination];
    s.source_unit()[i] = unit;
    s.destination_token()[i] = receiver;
    s.destination_unit()[i] = call.weighted ? size_of_token(call, image, receiver) : 1.0f;
  }
#pragma unroll 1
  for (int k = begin + int(threadIdx.x); k < end; k += S::kThreads) {
    const int token = call.keep[kept + k];
    s.kept()[k - begin] = token;
    s.kept_size()[k - begin] = size_of_token(call, image, token);
  }
}

/// Asks for a row of the image; a lane its vectors.
template <class S>
__device__ __forceinline__ void fetch_row(const MergeCall& call, int image, int token, float* to, int lane) {
  const auto* from = row_of<S>(call, image, token);
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) {
    const int unit = j * kWarp + lane;
    if (unit * S::kWidth < S::channels(call))
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to + unit * 4))),
                   "l"(from + unit * S::kWidth)
                   : "memory");
  }
}
/// Until every row that this thread asked for is there.
__device__ __forceinline__ void await_rows() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

/// Vector j of a row that this lane asked for; what lies past the row is no number, and normalise() leaves it out.
template <class S>
__device__ __forceinline__ typename S::Vector fetched(const float* row, int j, int lane) {
  return S::Vector::read(reinterpret_cast<const typename S::Residual*>(row + (j * kWarp + lane) * 4));
}

template <class S>
__device__ __forceinline__ void fetch_pair(const MergeCall& call, int image, const Shared<S>& s, int i, int warp,
                                           int lane) {
  fetch_row<S>(call, image, s.source_token()[i], s.row(warp, 0), lane);
  fetch_row<S>(call, image, s.destination_token()[i], s.row(warp, 1), lane);
}

/// Of pair i: adds a[i] P[i] to `sum`, leaves w2[i]. p is u_src x_src + u_dst x_dst, P its LayerNorm.
template <class S>
__device__ __forceinline__ void gate_pair(const MergeCall& call, const Shared<S>& s, int i, float (&p)[S::kValues],
                                          float (&sum)[S::kValues], int lane) {
  constexpr int kWidth = S::kWidth;
  normalise<kWidth>(p, S::channels(call), call.gate_eps, lane);
  const float a = call.gate_a[i];
  float product = 0;
#pragma unroll
  for (int quad = 0; quad < S::kValues / 4; ++quad) {
    const int c = (quad / (kWidth / 4) * kWarp + lane) * kWidth + quad % (kWidth / 4) * 4;
    pace<S::kValues>(quad);
    if (c < S::channels(call)) {
      float weight[4], bias[4], b[4];
      load_floats<float, 4>(call.gate_weight + c, weight);
      load_floats<float, 4>(call.gate_bias + c, bias);
      load_floats<float, 4>(call.gate_b + c, b);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float affine = __fmaf_rn(p[quad * 4 + e], weight[e], bias[e]);
        product = __fmaf_rn(affine, b[e], product);
        sum[quad * 4 + e] = __fmaf_rn(a, affine, sum[quad * 4 + e]);
      }
    }
  }
  product = warp_sum(product);
  if (lane == 0) s.token_gate()[i] = gate_of(product);
}

/// The warp's pairs: their w2, and the sum of their a[i] P[i] to the warp's row 1. Row 0 is free when the last pair has
/// been read.
template <class S>
__device__ __forceinline__ void gate_pairs(const MergeCall& call, int image, const Shared<S>& s, int warp, int lane) {
  float sum[S::kValues] = {};
  if (warp < call.merged) fetch_pair<S>(call, image, s, warp, warp, lane);
#pragma unroll 1
  for (int i = warp; i < call.merged; i += S::kWarps) {
    const float u = s.source_unit()[i], v = s.destination_unit()[i];
    float p[S::kValues];
    await_rows();
#pragma unroll
    for (int j = 0; j < S::kChunks; ++j) {
      pace<S::kValues>(j);
      const auto x = fetched<S>(s.row(warp, 0), j, lane), y = fetched<S>(s.row(warp, 1), j, lane);
#pragma unroll
      for (int e = 0; e < S::kWidth; ++e) p[j * S::kWidth + e] = __fmaf_rn(u, x.value(e), __fmul_rn(v, y.value(e)));
    }
    if (i + S::kWarps < call.merged) fetch_pair<S>(call, image, s, i + S::kWarps, warp, lane);
    gate_pair<S>(call, s, i, p, sum, lane);
  }
#pragma unroll
  for (int quad = 0; quad < S::kValues / 4; ++quad) {
    const float part[4] = {sum[quad * 4], sum[quad * 4 + 1], sum[quad * 4 + 2], sum[quad * 4 + 3]};
    store_floats<float, 4>(s.row(warp, 1) + position(quad, lane), part);
  }
}

/// w1 of the image from the warps' sums, between two barriers.
template <class S>
__device__ __forceinline__ void add_gates(const MergeCall& call, const Shared<S>& s) {
  const int warps = min(S::kWarps, call.merged);
  __syncthreads();
#pragma unroll 1
  for (int own = threadIdx.x; own < S::kPositions; own += S::kThreads) {
    float sum = 0;
#pragma unroll 4
    for (int warp = 0; warp < warps; ++warp) sum = __fadd_rn(sum, s.row(warp, 1)[own]);
    s.channel_gate()[own] = __fadd_rn(1.0f, gate_of(sum));
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

/// row += S'[i] w / divisor for vector j of the source. In this order a gate of 1 leaves the factor, and so the sum, as
/// without a gate.
template <class S>
__device__ __forceinline__ void add_vector(const MergeCall& call, const Shared<S>& s, const typename S::Vector& x,
                                           int j, float share, float w2, float (&row)[S::kValues], int lane) {
  constexpr int kWidth = S::kWidth;
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

/// Source i, from the warp's row 1 (`fetched_already`) or from global memory.
template <class S>
__device__ __forceinline__ void add_source(const MergeCall& call, int image, const Shared<S>& s, int i, float divisor,
                                           const float* fetched_already, float (&row)[S::kValues], int lane) {
  const auto* source = row_of<S>(call, image, s.source_token()[i]);
  const float share = quotient(s.weight()[i], divisor), w2 = call.gate_a ? s.token_gate()[i] : 0.0f;
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) {
    pace<S::kValues>(j);
    if (fetched_already) {
      add_vector<S>(call, s, fetched<S>(fetched_already, j, lane), j, share, w2, row, lane);
      continue;
    }
    const int c = (j * kWarp + lane) * S::kWidth;
    add_vector<S>(call, s, S::Vector::read(source + (c < S::channels(call) ? c : 0)), j, share, w2, row, lane);
  }
}

/// An output token before its rows are there.
struct Token {
  float divisor;
  int first;  ///< of its sources; -1: none
};

/// Asks for token k's row, unless `row_asked`, and for its first source's; meanwhile finds its divisor and its size,
/// which it writes.
template <class S>
__device__ __forceinline__ Token prepare(const MergeCall& call, int image, const Shared<S>& s, int k, int begin,
                                         bool row_asked, int warp, int lane) {
  if (!row_asked) fetch_row<S>(call, image, s.kept()[k - begin], s.row(warp, 0), lane);
  Sources find(s.destination(), call.merged, k, lane);
  float grown = s.kept_size()[k - begin];
  Token token{call.weighted ? grown : 1.0f, find.next()};
  if (token.first >= 0) fetch_row<S>(call, image, s.source_token()[token.first], s.row(warp, 1), lane);
  for (int i = token.first; i >= 0; i = find.next()) {
    token.divisor = __fadd_rn(token.divisor, s.weight()[i]);
    grown = __fadd_rn(grown, s.growth()[i]);
  }
  if (lane == 0) call.sizes_out[int64_t(image) * call.kept + k] = grown;
  return token;
}

/// Token k's row out of what was asked for: copied, or with its first source.
template <class S>
__device__ __forceinline__ void take_rows(const MergeCall& call, int image, const Shared<S>& s, int at,
                                          const Token& token, float (&row)[S::kValues], int warp, int lane) {
  await_rows();
  const bool alone = token.first < 0;
  const float unit = call.weighted ? s.kept_size()[at] : 1.0f;
  const float share = alone ? 1.0f : quotient(unit, token.divisor);  // x 1 is x
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) {
    const auto x = fetched<S>(s.row(warp, 0), j, lane);
#pragma unroll
    for (int e = 0; e < S::kWidth; ++e) row[j * S::kWidth + e] = __fmul_rn(x.value(e), share);
  }
  if (!alone) add_source<S>(call, image, s, token.first, token.divisor, s.row(warp, 1), row, lane);
}

/// The merged row of output token k: x_out and y.
template <class S>
__device__ __forceinline__ void write_row(const MergeCall& call, int image, int k, float (&rows)[1][S::kValues],
                                          int lane) {
  using Y = typename S::Compute;
  const int64_t output = int64_t(image) * call.kept + k, to = output * S::channels(call);
  store_row<typename S::Residual, S::kWidth>(static_cast<typename S::Residual*>(call.x_out) + to, rows[0],
                                             S::channels(call), lane);
  const float inverse = normalise<S::kWidth>(rows[0], S::channels(call), call.norm_eps, lane);
  if (call.normalised) {
    store_row<Y, S::kWidth>(static_cast<Y*>(call.normalised) + to, rows[0], S::channels(call), lane);
    if (lane == 0) call.inverse_deviation[output] = inverse;
  }
  store_affine<Y, S::kWidth>(rows, call.norm_weight, call.norm_bias, S::channels(call), lane,
                             static_cast<Y*>(call.y) + to, 0);
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) merge_kernel(const MergeCall call, int slice) {
  extern __shared__ float4 memory[];
  const int image = int(blockIdx.y);
  const int begin = int(blockIdx.x) * slice, end = min(call.kept, begin + slice);
  const Shared<S> s{reinterpret_cast<float*>(memory), call.merged, slice};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int k = begin + warp;
  stage_plan<S>(call, image, s, begin, end);
  __syncthreads();
  if (call.gate_a) gate_pairs<S>(call, image, s, warp, lane);
  if (k < end) fetch_row<S>(call, image, s.kept()[k - begin], s.row(warp, 0), lane);
  if (call.gate_a) add_gates<S>(call, s);
  if (k >= end) return;
  Token next = prepare<S>(call, image, s, k, begin, /*row_asked=*/true, warp, lane);
#pragma unroll 1
  for (; k < end; k += S::kWarps) {
    const Token token = next;
    float rows[1][S::kValues];
    take_rows<S>(call, image, s, k - begin, token, rows[0], warp, lane);
    if (k + S::kWarps < end) next = prepare<S>(call, image, s, k + S::kWarps, begin, /*row_asked=*/false, warp, lane);
    if (token.first >= 0) {
      Sources find(s.destination(), call.merged, k, lane);
      find.next();
      for (int i = find.next(); i >= 0; i = find.next())
        add_source<S>(call, image, s, i, token.divisor, nullptr, rows[0], lane);
    }
    write_row<S>(call, image, k, rows, lane);
  }
}

/// Output tokens of a block: the cut of images that fills the multiprocessors' rounds of blocks with the least work,
/// counted in rows; every block of a gated image pays for R pairs, some two rows from L2.
template <class S>
int slice_of(const MergeCall& call) {
  const int64_t room = int64_t(multiprocessors()) * S::kBlocks;
  const int most = (call.kept + S::kWarps - 1) / S::kWarps;
  int64_t best = 0;
  int chosen = call.kept;
  for (int slices = 1; slices <= most; ++slices) {
    const int slice = (call.kept + slices - 1) / slices;
    const int64_t rounds = (call.batch * int64_t(slices) + room - 1) / room;
    const int64_t work = rounds * (slice + (call.gate_a ? call.merged : 0));
    if (slices > 1 && work >= best) continue;
    best = work;
    chosen = slice;
  }
  return chosen;
}

template <class S>
void launch(const MergeCall& call, cudaStream_t stream) {
  const int slice = slice_of<S>(call), slices = (call.kept + slice - 1) / slice;
  const size_t bytes = Shared<S>::bytes(call.merged, slice);
  const size_t limit = shared_memory_limit();
  if (bytes > limit)
    fail(ExitCode::device, "merge: a plan of ", call.merged, " pairs of ", call.channels, " channels needs ", bytes,
         " bytes of shared memory; this device has ", limit);
  if (bytes > (48u << 10))
    PYRA_CUDA(cudaFuncSetAttribute(merge_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  merge_kernel<S><<<dim3(unsigned(slices), unsigned(call.batch)), S::kThreads, bytes, stream>>>(call, slice);
  PYRA_CUDA_LAUNCHED();
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
      if (call.residual == DType::fp32) return launch<Shape<float, Compute, Row>>(call, stream);
      launch<Shape<Compute, Compute, Row>>(call, stream);
    });
  });
}

}  // namespace pyra::kernels::cuda
