// The gradient of a merge: d_x of kept tokens and sources, and with a gate the gradients of its a, b, weight and bias.
//
// A block owns an image. Its plan, its shares and the gate's sums stand in shared memory; rows are read from global
// memory, where an image's pairs stay in the L2 from one phase to the next:
//   statistics  a warp a pair: mean and deviation of S + D, w2
//   channels    a thread two channels, over all pairs in the plan's order: w1 and its gradient
//   pairs       a warp a pair: the gradients of w2 and a, and the two means that LayerNorm's gradient subtracts
//   parameters  a thread two channels, over all pairs: the gradients of b, weight and bias
//   tokens      a warp a token: what it gets from its own output row, and through the gate
// Everything is added in the order of the plan, so there are no atomics. Bytes moved: K rows of d_out (a source reads
// its destination's again, from L2), 2R rows of x with a gate (6 times, from L2), N rows written twice.
#include "kernels/cuda/merge_backward.h"

#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

/// Of the element types only d_branch's knows, and that store is cheap to choose at run time: an instance for each type
/// would treble what is compiled.
template <class Row>
struct Shape {
  static constexpr int kValues = Row::kValues;
  static constexpr int kWidth = kVectorOf<float, float>;
  static constexpr int kWarps = kValues <= 32 ? 16 : 8;  // 128 or 255 registers a thread
  static constexpr int kThreads = kWarps * kWarp;
  using Raw = RawRow<float, kValues, kWidth>;
  [[nodiscard]] __device__ __forceinline__ static int channels(const MergeBackwardCall& call) {
    return Row::channels(call.channels);
  }
};

/// Floats of a block's shared memory: arrays of the pairs, of kept tokens, of all tokens and of channels.
struct Shared {
  float* memory;
  int merged, kept, tokens, channels;

  static constexpr int kPairArrays = 12;
  [[nodiscard]] static size_t bytes(const MergeBackwardCall& call) {
    const size_t gate = call.gate_a ? 2 * size_t(call.channels) : 0;
    return sizeof(float) * (kPairArrays * size_t(call.merged) + 2 * size_t(call.kept) + 2 * size_t(call.tokens) + gate);
  }
  [[nodiscard]] __device__ float* pair(int array) const { return memory + array * merged; }
  [[nodiscard]] __device__ int* pair_int(int array) const { return reinterpret_cast<int*>(pair(array)); }
  __device__ int* source() const { return pair_int(0); }
  __device__ int* destination() const { return pair_int(1); }  // position in keep
  __device__ int* receiver() const { return pair_int(2); }     // token
  __device__ float* source_unit() const { return pair(3); }
  __device__ float* receiver_unit() const { return pair(4); }
  __device__ float* share() const { return pair(5); }  // of the source in its output
  __device__ float* mean() const { return pair(6); }
  __device__ float* inverse() const { return pair(7); }
  __device__ float* w2() const { return pair(8); }
  __device__ float* d_z2() const { return pair(9); }
  __device__ float* mean_g() const { return pair(10); }
  __device__ float* slope_g() const { return pair(11); }
  __device__ float* kept_share() const { return memory + kPairArrays * merged; }
  __device__ float* divisor() const { return kept_share() + kept; }
  /// What becomes of a token: its position among the kept, or -1 - its pair, or kDropped.
  __device__ int* role() const { return reinterpret_cast<int*>(divisor() + kept); }
  __device__ float* w1() const { return divisor() + kept + 2 * tokens; }
  __device__ float* d_z1() const { return w1() + channels; }
};
constexpr int kDropped = 1 << 30;
constexpr int kMostChannels =
    48 * kWarp;  ///< ViT-H and ViT-g; the next shape alone would take as long to compile as all

__device__ __forceinline__ float unit_of(const MergeBackwardCall& call, int image, int token) {
  return call.weighted && call.sizes ? call.sizes[int64_t(image) * call.tokens + token] : 1.0f;
}

template <class S>
__device__ __forceinline__ const float* row_of(const MergeBackwardCall& call, int image, int token) {
  return call.x + (int64_t(image) * call.tokens + token) * S::channels(call);
}

template <class S>
__device__ __forceinline__ const float* gradient_of(const MergeBackwardCall& call, int image, int position) {
  return call.d_out + (int64_t(image) * call.kept + position) * S::channels(call);
}

/// The image's plan to shared memory: roles, units, divisors, shares. Ends with a barrier.
template <class S>
__device__ void stage_plan(const MergeBackwardCall& call, int image, const Shared& s) {
  const int64_t pairs = int64_t(image) * call.merged, kept = int64_t(image) * call.kept;
  for (int t = threadIdx.x; t < call.tokens; t += S::kThreads) s.role()[t] = kDropped;
  for (int i = threadIdx.x; i < call.merged; i += S::kThreads) {
    const int token = call.src[pairs + i], position = call.dst[pairs + i], receiver = call.keep[kept + position];
    s.source()[i] = token;
    s.destination()[i] = position;
    s.receiver()[i] = receiver;
    s.source_unit()[i] = unit_of(call, image, token);
    s.receiver_unit()[i] = unit_of(call, image, receiver);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < call.merged; i += S::kThreads) s.role()[s.source()[i]] = -1 - i;
  for (int k = threadIdx.x; k < call.kept; k += S::kThreads) {
    const int token = call.keep[kept + k];
    const float unit = unit_of(call, image, token);
    float divisor = unit;
    bool receives = false;
    for (int i = 0; i < call.merged; ++i) {
      if (s.destination()[i] != k) continue;
      receives = true;
      divisor = __fadd_rn(divisor, s.source_unit()[i]);
    }
    s.role()[token] = k;
    s.divisor()[k] = divisor;
    s.kept_share()[k] = receives ? quotient(unit, divisor) : 1.0f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < call.merged; i += S::kThreads)
    s.share()[i] = quotient(s.source_unit()[i], s.divisor()[s.destination()[i]]);
  __syncthreads();
}

/// A warp's row S + D of pair i, normalised by the statistics in shared memory; zero beyond the channels.
template <class S>
__device__ __forceinline__ void normalised_pair(const MergeBackwardCall& call, int image, const Shared& s, int i,
                                                float (&n)[S::kValues], int lane) {
  const float *source = row_of<S>(call, image, s.source()[i]), *receiver = row_of<S>(call, image, s.receiver()[i]);
  const float u = s.source_unit()[i], v = s.receiver_unit()[i], mean = s.mean()[i], inverse = s.inverse()[i];
#pragma unroll
  for (int j = 0; j < S::kValues / S::kWidth; ++j) {
    pace<S::kValues>(j);
    const int c = (j * kWarp + lane) * S::kWidth;
    const bool inside = c < S::channels(call);
    const auto x = Words<float, S::kWidth>::read(source + (inside ? c : 0)),
               y = Words<float, S::kWidth>::read(receiver + (inside ? c : 0));
#pragma unroll
    for (int e = 0; e < S::kWidth; ++e) {
      const float sum = __fmaf_rn(u, x.value(e), __fmul_rn(v, y.value(e)));
      n[j * S::kWidth + e] = inside ? __fmul_rn(__fsub_rn(sum, mean), inverse) : 0.0f;
    }
  }
}

/// Mean, deviation and w2 of every pair.
template <class S>
__device__ void find_statistics(const MergeBackwardCall& call, int image, const Shared& s, int warp, int lane) {
  const int channels = S::channels(call);
  for (int i = warp; i < call.merged; i += S::kWarps) {
    const float *source = row_of<S>(call, image, s.source()[i]), *receiver = row_of<S>(call, image, s.receiver()[i]);
    const float u = s.source_unit()[i], v = s.receiver_unit()[i];
    float p[S::kValues];
    float sum = 0;
#pragma unroll
    for (int j = 0; j < S::kValues / S::kWidth; ++j) {
      pace<S::kValues>(j);
      const int c = (j * kWarp + lane) * S::kWidth, from = c < channels ? c : 0;
      const auto x = Words<float, S::kWidth>::read(source + from), y = Words<float, S::kWidth>::read(receiver + from);
#pragma unroll
      for (int e = 0; e < S::kWidth; ++e) {
        const float value = __fmaf_rn(u, x.value(e), __fmul_rn(v, y.value(e)));
        p[j * S::kWidth + e] = value;
        sum += c < channels ? value : 0.0f;
      }
    }
    const float mean = quotient(warp_sum(sum), float(channels));
    const float inverse = normalise<S::kWidth>(p, channels, call.gate_eps, lane);
    float product = 0;
#pragma unroll
    for (int v4 = 0; v4 < S::kValues; ++v4) {
      const int c = (v4 / S::kWidth * kWarp + lane) * S::kWidth + v4 % S::kWidth;
      if (c < channels)
        product = __fmaf_rn(__fmaf_rn(p[v4], call.gate_weight[c], call.gate_bias[c]), call.gate_b[c], product);
    }
    product = warp_sum(product);
    if (lane == 0) s.mean()[i] = mean, s.inverse()[i] = inverse, s.w2()[i] = gate_of(product);
  }
  __syncthreads();
}

/// w1, and the gradient of what it is the sigmoid of.
template <class S>
__device__ void find_channels(const MergeBackwardCall& call, int image, const Shared& s) {
  for (int c = 2 * int(threadIdx.x); c < S::channels(call); c += 2 * S::kThreads) {
    const float2 weight = *reinterpret_cast<const float2*>(call.gate_weight + c),
                 bias = *reinterpret_cast<const float2*>(call.gate_bias + c);
    float2 z = make_float2(0, 0), d = make_float2(0, 0);
#pragma unroll 4
    for (int i = 0; i < call.merged; ++i) {
      const float2 x = *reinterpret_cast<const float2*>(row_of<S>(call, image, s.source()[i]) + c),
                   y = *reinterpret_cast<const float2*>(row_of<S>(call, image, s.receiver()[i]) + c),
                   g = *reinterpret_cast<const float2*>(gradient_of<S>(call, image, s.destination()[i]) + c);
      const float u = s.source_unit()[i], v = s.receiver_unit()[i], mean = s.mean()[i], inverse = s.inverse()[i];
      const float a = call.gate_a[i], share = s.share()[i] * s.w2()[i];
      z.x += a * ((u * x.x + v * y.x - mean) * inverse * weight.x + bias.x);
      z.y += a * ((u * x.y + v * y.y - mean) * inverse * weight.y + bias.y);
      d.x += share * g.x * x.x;
      d.y += share * g.y * x.y;
    }
    const float tx = gate_of(z.x), ty = gate_of(z.y);
    s.w1()[c] = 1.0f + tx;
    s.w1()[c + 1] = 1.0f + ty;
    s.d_z1()[c] = d.x * 0.5f * (1.0f - tx * tx);
    s.d_z1()[c + 1] = d.y * 0.5f * (1.0f - ty * ty);
  }
  __syncthreads();
}

/// The gradients of w2 and a, and the means that LayerNorm's gradient subtracts.
template <class S>
__device__ void find_pairs(const MergeBackwardCall& call, int image, const Shared& s, float* d_a, int warp, int lane) {
  const int channels = S::channels(call);
  for (int i = warp; i < call.merged; i += S::kWarps) {
    float n[S::kValues];
    normalised_pair<S>(call, image, s, i, n, lane);
    const float *source = row_of<S>(call, image, s.source()[i]),
                *given = gradient_of<S>(call, image, s.destination()[i]);
    float d_w2 = 0, own = 0;
#pragma unroll
    for (int v = 0; v < S::kValues; ++v) {
      const int c = (v / S::kWidth * kWarp + lane) * S::kWidth + v % S::kWidth;
      if (c >= channels) continue;
      d_w2 = __fmaf_rn(given[c] * source[c], s.w1()[c], d_w2);
      own = __fmaf_rn(s.d_z1()[c], __fmaf_rn(n[v], call.gate_weight[c], call.gate_bias[c]), own);
    }
    const float w2 = s.w2()[i];
    const float d_z2 = s.share()[i] * warp_sum(d_w2) * 0.5f * (1.0f - w2 * w2);
    own = warp_sum(own);
    const float a = call.gate_a[i];
    float sum = 0, products = 0;
#pragma unroll
    for (int v = 0; v < S::kValues; ++v) {
      const int c = (v / S::kWidth * kWarp + lane) * S::kWidth + v % S::kWidth;
      if (c >= channels) continue;
      const float g = (a * s.d_z1()[c] + d_z2 * call.gate_b[c]) * call.gate_weight[c];
      sum += g;
      products = __fmaf_rn(g, n[v], products);
    }
    sum = warp_sum(sum);
    products = warp_sum(products);
    if (lane != 0) continue;
    s.d_z2()[i] = d_z2;
    s.mean_g()[i] = quotient(sum, float(channels));
    s.slope_g()[i] = quotient(products, float(channels));
    if (d_a) d_a[i] = own;
  }
  __syncthreads();
}

/// The gradients of b, weight and bias.
template <class S>
__device__ void find_parameters(const MergeBackwardCall& call, int image, const Shared& s, float* d_b) {
  const int channels = S::channels(call);
  for (int c = 2 * int(threadIdx.x); c < channels; c += 2 * S::kThreads) {
    const float2 weight = *reinterpret_cast<const float2*>(call.gate_weight + c),
                 bias = *reinterpret_cast<const float2*>(call.gate_bias + c),
                 b = *reinterpret_cast<const float2*>(call.gate_b + c);
    const float zx = s.d_z1()[c], zy = s.d_z1()[c + 1];
    float2 sum_b = make_float2(0, 0), sum_weight = make_float2(0, 0), sum_bias = make_float2(0, 0);
#pragma unroll 4
    for (int i = 0; i < call.merged; ++i) {
      const float2 x = *reinterpret_cast<const float2*>(row_of<S>(call, image, s.source()[i]) + c),
                   y = *reinterpret_cast<const float2*>(row_of<S>(call, image, s.receiver()[i]) + c);
      const float u = s.source_unit()[i], v = s.receiver_unit()[i], mean = s.mean()[i], inverse = s.inverse()[i];
      const float a = call.gate_a[i], d_z2 = s.d_z2()[i];
      const float nx = (u * x.x + v * y.x - mean) * inverse, ny = (u * x.y + v * y.y - mean) * inverse;
      const float px = a * zx + d_z2 * b.x, py = a * zy + d_z2 * b.y;
      sum_b.x += d_z2 * (nx * weight.x + bias.x);
      sum_b.y += d_z2 * (ny * weight.y + bias.y);
      sum_weight.x += px * nx;
      sum_weight.y += py * ny;
      sum_bias.x += px;
      sum_bias.y += py;
    }
    float* const to = d_b + c;
    to[0] = sum_b.x, to[1] = sum_b.y;
    to[channels] = sum_weight.x, to[channels + 1] = sum_weight.y;
    to[2 * channels] = sum_bias.x, to[2 * channels + 1] = sum_bias.y;
  }
}

/// row += unit * what flows through the gate's LayerNorm to pair i.
template <class S>
__device__ __forceinline__ void add_through_gate(const MergeBackwardCall& call, int image, const Shared& s, int i,
                                                 float unit, float (&row)[S::kValues], int lane) {
  float n[S::kValues];
  normalised_pair<S>(call, image, s, i, n, lane);
  const float a = call.gate_a[i], d_z2 = s.d_z2()[i], mean = s.mean_g()[i], slope = s.slope_g()[i];
  const float factor = __fmul_rn(unit, s.inverse()[i]);
#pragma unroll
  for (int v = 0; v < S::kValues; ++v) {
    const int c = (v / S::kWidth * kWarp + lane) * S::kWidth + v % S::kWidth;
    if (c >= S::channels(call)) continue;
    const float g = (a * s.d_z1()[c] + d_z2 * call.gate_b[c]) * call.gate_weight[c];
    row[v] = __fmaf_rn(factor, __fmaf_rn(-n[v], slope, __fsub_rn(g, mean)), row[v]);
  }
}

/// The gradient of one token.
template <class S>
__device__ __forceinline__ void token_row(const MergeBackwardCall& call, int image, const Shared& s, int token,
                                          int lane) {
  const int channels = S::channels(call), role = s.role()[token];
  const bool gated = call.gate_a != nullptr;
  float row[S::kValues];
  if (role == kDropped) {
#pragma unroll
    for (int v = 0; v < S::kValues; ++v) row[v] = 0;
  } else {
    const int pair = -1 - role, position = role >= 0 ? role : s.destination()[pair];
    typename S::Raw given;
    given.load(gradient_of<S>(call, image, position), channels, lane);
    const float share = role >= 0 ? s.kept_share()[position] : s.share()[pair];
#pragma unroll
    for (int v = 0; v < S::kValues; ++v) row[v] = __fmul_rn(given.value(v), share);
    if (gated && role < 0) {
      const float w2 = s.w2()[pair];
#pragma unroll
      for (int v = 0; v < S::kValues; ++v) {
        const int c = (v / S::kWidth * kWarp + lane) * S::kWidth + v % S::kWidth;
        if (c < channels) row[v] = __fmul_rn(row[v], __fmaf_rn(s.w1()[c], w2, 1.0f));
      }
      add_through_gate<S>(call, image, s, pair, s.source_unit()[pair], row, lane);
    }
    if (gated && role >= 0) {
      for (int base = 0; base < call.merged; base += kWarp) {
        const int own = base + lane;
        unsigned mask = __ballot_sync(kAllLanes, own < call.merged && s.destination()[own] == position);
        for (; mask != 0; mask &= mask - 1) {
          const int i = base + __ffs(int(mask)) - 1;
          add_through_gate<S>(call, image, s, i, s.receiver_unit()[i], row, lane);
        }
      }
    }
  }
  const int64_t at = (int64_t(image) * call.tokens + token) * channels;
  store_row<float, S::kWidth>(call.d_x + at, row, channels, lane);
  if (!call.d_branch) return;
  const float scale = call.branch_scale ? call.branch_scale[image] : 1.0f;
#pragma unroll
  for (int v = 0; v < S::kValues; ++v) row[v] = __fmul_rn(row[v], scale);
  if (call.compute == DType::fp32)
    store_row<float, S::kWidth>(static_cast<float*>(call.d_branch) + at, row, channels, lane);
  else if (call.compute == DType::bf16)
    store_row<__nv_bfloat16, S::kWidth>(static_cast<__nv_bfloat16*>(call.d_branch) + at, row, channels, lane);
  else
    store_row<__half, S::kWidth>(static_cast<__half*>(call.d_branch) + at, row, channels, lane);
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1) backward_kernel(const MergeBackwardCall call) {
  extern __shared__ float4 memory[];
  const Shared s{reinterpret_cast<float*>(memory), call.merged, call.kept, call.tokens, S::channels(call)};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, image = blockIdx.x;
  stage_plan<S>(call, image, s);
  if (call.gate_a) {
    float* d_gate = call.d_gate ? call.d_gate + int64_t(image) * (call.merged + 3 * S::channels(call)) : nullptr;
    find_statistics<S>(call, image, s, warp, lane);
    find_channels<S>(call, image, s);
    find_pairs<S>(call, image, s, d_gate, warp, lane);
    if (d_gate) find_parameters<S>(call, image, s, d_gate + call.merged);
  }
#pragma unroll 1
  for (int token = warp; token < call.tokens; token += S::kWarps) token_row<S>(call, image, s, token, lane);
}

template <class S>
void launch(const MergeBackwardCall& call, cudaStream_t stream) {
  const size_t bytes = Shared::bytes(call);
  if (bytes > shared_memory_limit())
    fail(ExitCode::usage, "merge_backward: a plan of ", call.merged, " pairs needs ", bytes,
         " bytes of shared memory; this GPU has ", shared_memory_limit());
  if (bytes > kSharedAlways) allow_shared_memory<&backward_kernel<S>>();
  backward_kernel<S><<<call.batch, S::kThreads, bytes, stream>>>(call);
}

void check(const MergeBackwardCall& call) {
  constexpr const char* kWho = "merge_backward";
  check_channels(kWho, call.channels);
  check_dtype(kWho, call.compute);
  if (call.channels > kMostChannels)
    fail(ExitCode::usage, kWho, ": ", call.channels, " channels; a GPU trains merging models of up to ", kMostChannels,
         "; use --device cpu");
  if (call.batch < 0 || call.kept < 1 || call.merged < 0 || call.kept + call.merged > call.tokens)
    fail(ExitCode::usage, kWho, ": ", call.tokens, " tokens, ", call.kept, " kept, ", call.merged, " merged, ",
         call.batch, " images");
  if (call.batch == 0) return;
  check_pointer(kWho, "x", call.x);
  check_pointer(kWho, "d_out", call.d_out);
  check_pointer(kWho, "d_x", call.d_x);
  if (call.d_branch) check_pointer(kWho, "d_branch", call.d_branch);
  if (!call.keep || (call.merged > 0 && (!call.src || !call.dst)))
    fail(ExitCode::usage, kWho, ": keep, src or dst is null");
  if (call.gate_a && (!call.gate_b || !call.gate_weight || !call.gate_bias))
    fail(ExitCode::usage, kWho, ": a gate without gate_b, gate_weight or gate_bias");
}

}  // namespace

void merge_backward(const MergeBackwardCall& call, cudaStream_t stream) {
  check(call);
  if (call.batch == 0) return;
  with_row_shape(call.channels, [&](auto row) {
    if constexpr (decltype(row)::kValues * kWarp <= kMostChannels) launch<Shape<decltype(row)>>(call, stream);
  });
  PYRA_CUDA_LAUNCHED();
}

}  // namespace pyra::kernels::cuda
