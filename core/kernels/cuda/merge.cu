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
// Where images are few the blocks are lone ones (Shape), as many as give each some 8 rows, and gates of many pairs are
// shared by clusters of them. One image of 197 tokens, 39 of them merged (H200, clock64 of the first block): 13.2 k
// cycles, of which the plan takes 1.9, gates 7.7, rows 3.6; 14.6 k where no cluster shares the gates (10.0), 19.5 k by
// the blocks for many images. For 16 pairs a cluster's barriers cost more than it saves (low, one image: 2 % of a
// pass).
//
// Tried and lost: reading a round's or a source's rows ahead of their turn into registers, which spill, or halve
// the warps whose loads are in flight; and by cp.async into two rows of shared memory a warp, with a warp's sums of
// a[i] P[i] in registers instead of rounds (H200, ViT-B, 256 images, all merges of a pass: high 0.84 ms for 0.73,
// low 1.15 for 1.03): the way through shared memory costs more than the wait that it hides, with 24 warps to switch
// between. Where images are many, gates shared by a cluster, sums passed through distributed shared memory (23 % fewer
// rows to read at the high schedule), and with or without it: rows with sources first and dealt to warps as they come,
// the next row asked into L2 or L1, the plan staged with one wait instead of three (the last two are in lone blocks):
// 0.83 to 0.85 ms for 0.75 (high), 1.13 for 1.03 (low), and the whole pass gains nothing by it (42 091 to 42 684
// images/s for 41 943, within what a repeated run differs by).
//
// Bytes moved: K + R tokens read (the gate's R and their destinations once more, from L2 in the main), K written twice.
#include "kernels/cuda/merge.h"

#include <algorithm>

#include "kernels/cuda/merge_gate.cuh"

namespace pyra::kernels::cuda {
namespace {

/// The size of a token of the image, once stage_image() has run.
template <class S>
__device__ __forceinline__ float staged_size(const MergeCall& call, int image, const Shared<S>& s, int token) {
  return S::kLone ? s.image_sizes(call.gate_a != nullptr)[token] : size_of_token(call, image, token);
}

/// Of a lone block: the image's sizes, keep, src and dst, all asked for at once. Ends with a barrier.
template <class S>
__device__ __forceinline__ void stage_image(const MergeCall& call, int image, const Shared<S>& s) {
  if constexpr (!S::kLone) return;
  const int64_t pairs = int64_t(image) * call.merged, kept = int64_t(image) * call.kept;
  float* sizes = s.image_sizes(call.gate_a != nullptr);
  for (int i = threadIdx.x; i < call.tokens; i += S::kThreads) {
    sizes[i] = size_of_token(call, image, i);
    if (i < call.kept) s.kept()[i] = call.keep[kept + i];
    if (i < call.merged) s.source_token()[i] = call.src[pairs + i], s.destination()[i] = call.dst[pairs + i];
  }
  __syncthreads();
}

/// The image's plan and the slice's part of `keep` to shared memory. Ends with a barrier.
template <class S>
__device__ __forceinline__ void stage_plan(const MergeCall& call, int image, const Shared<S>& s, int begin, int end) {
  const int64_t pairs = int64_t(image) * call.merged, kept = int64_t(image) * call.kept;
#pragma unroll 1
  for (int i = threadIdx.x; i < call.merged; i += S::kThreads) {
    const int token = S::kLone ? s.source_token()[i] : call.src[pairs + i];
    const int destination = S::kLone ? s.destination()[i] : call.dst[pairs + i];
    const float size = staged_size<S>(call, image, s, token), unit = call.weighted ? size : 1.0f;
    if constexpr (!S::kLone) s.source_token()[i] = token, s.destination()[i] = destination;
    s.weight()[i] = call.src_weight ? __fmul_rn(call.src_weight[pairs + i], unit) : unit;
    s.growth()[i] = call.src_size_scale ? __fmul_rn(size, fmaxf(0.0f, call.src_size_scale[pairs + i])) : size;
    if (!call.gate_a) continue;
    const int receiver = S::kLone ? s.kept()[destination] : call.keep[kept + destination];
    s.source_unit()[i] = unit;
    s.destination_token()[i] = receiver;
    s.destination_unit()[i] = call.weighted ? staged_size<S>(call, image, s, receiver) : 1.0f;
  }
  if constexpr (!S::kLone) {
#pragma unroll 1
    for (int k = begin + int(threadIdx.x); k < end; k += S::kThreads) s.kept()[k - begin] = call.keep[kept + k];
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

/// Output token k of the image, by a warp: x_out, sizes_out and y.
template <class S>
__device__ __forceinline__ void merge_row(const MergeCall& call, int image, const Shared<S>& s, int k, int token,
                                          int lane) {
  using T = typename S::Residual;
  using Y = typename S::Compute;
  typename S::Raw raw;
  raw.load(row_of<S>(call, image, token), S::channels(call), lane);
  const float size = staged_size<S>(call, image, s, token), unit = call.weighted ? size : 1.0f;
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
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    merge_kernel(const MergeCall call, int slice, bool together) {
  extern __shared__ float4 memory[];
  const bool gated = call.gate_a != nullptr;
  const int image = int(blockIdx.y);
  const int begin = int(blockIdx.x) * slice, end = min(call.kept, begin + slice);
  const Shared<S> s{reinterpret_cast<float*>(memory), call.merged, S::kLone ? call.kept : slice};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto kept_token = [&](int k) { return s.kept()[S::kLone ? k : k - begin]; };
  if (together) arrive(S::kSharers);
  fetch_ahead(call.norm_weight, S::channels(call));
  fetch_ahead(call.norm_bias, S::channels(call));
  if (gated && warp == S::kWarps - 1) share_gate_terms<S>(call, s, lane);
  const auto fetch_first = [&] {
    if constexpr (S::kLone) {
      const int first = begin + warp;
      if (gated && first < end) fetch_row<S>(row_of<S>(call, image, kept_token(first)), S::channels(call), lane);
    }
  };
  admit_next();
  const bool tallied = call.plan_there.count != nullptr;
  if (tallied) {  // x may still be on its way
    if (lane == 0) await_tally(call.plan_there);
    __syncwarp();
  } else {
    await_earlier();
  }
  stage_image<S>(call, image, s);
  if (!tallied) fetch_first();
  stage_plan<S>(call, image, s, begin, end);
  if (tallied) {
    await_earlier();
    fetch_first();
  }
  if (gated) compute_gates<S>(call, image, s, together, warp, lane);
#pragma unroll 1
  for (int k = begin + warp; k < end; k += S::kWarps) merge_row<S>(call, image, s, k, kept_token(k), lane);
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
void launch(const MergeCall& call, int slices, bool together, cudaStream_t stream) {
  // A cluster needs all its blocks, others only those that own rows.
  const int slice = (call.kept + slices - 1) / slices, blocks = together ? slices : (call.kept + slice - 1) / slice;
  const size_t bytes = Shared<S>::bytes(call, S::kLone ? call.kept : slice, together), limit = shared_memory_limit();
  if (bytes > limit)
    fail(ExitCode::device, "merge: a plan of ", call.merged, " pairs of ", call.channels, " channels needs ", bytes,
         " bytes of shared memory; this device has ", limit);
  launch_dependent<&merge_kernel<S>>(
      {dim3(unsigned(blocks), unsigned(call.batch)), S::kThreads, bytes, together ? S::kSharers : 1}, stream, call,
      slice, together);
}

/// By lone blocks, where these are no more than multiprocessors and their memory suffices; false where not.
template <class S>
bool launch_lone(const MergeCall& call, cudaStream_t stream) {
  constexpr int kRowsWanted = 8;  // of a block: in a whole pass of one image 24 cost 2 % more
  constexpr int kPairsToShare = 20;
  const Device device = device_for<&merge_kernel<S>>();
  const int wanted = (call.kept + kRowsWanted - 1) / kRowsWanted;
  // Not on every multiprocessor: a cluster's blocks must find room beside each other.
  const int clusters =
      std::min(device.processors * 3 / 4 / S::kSharers / call.batch, (wanted + S::kSharers - 1) / S::kSharers);
  if (S::kMayShare && call.gate_a && call.merged > kPairsToShare && device.has_clusters && clusters > 0 &&
      clusters * S::kSharers * S::kWarps >= call.kept &&
      Shared<S>::bytes(call, call.kept, true) <= shared_memory_limit()) {
    launch<S>(call, clusters * S::kSharers, true, stream);
    return true;
  }
  const int blocks = std::min(device.processors / call.batch, wanted);
  if (blocks * S::kWarps < call.kept || Shared<S>::bytes(call, call.kept, false) > shared_memory_limit()) return false;
  launch<S>(call, blocks, false, stream);
  return true;
}

template <class Residual, class Compute, class Row>
void launch(const MergeCall& call, cudaStream_t stream) {
  using Many = Shape<Residual, Compute, Row, false>;
  if (launch_lone<Shape<Residual, Compute, Row, true>>(call, stream)) return;
  launch<Many>(call, slices_of<Many>(call), false, stream);
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
