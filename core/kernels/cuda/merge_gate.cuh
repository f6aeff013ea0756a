// PYRA's gate of all pairs of an image, by one block or by a cluster: w1 [C] and w2 [R] in shared memory. arXiv
// 2403.09192; the formula is kernels/merge.h's.
#pragma once
#include "kernels/cuda/merge_block.cuh"

namespace pyra::kernels::cuda {
namespace {

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

/// A warp's pair i: a[i] p to `slot`, w2[i] to each of kSharers blocks. p = u_src x_src + u_dst x_dst, normalised.
template <class S, int kSharers>
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
  if (lane < kSharers) of_block(s.token_gate(), lane, kSharers)[i] = gate_of(product);
}

/// w1 of the channel at `own` from the sum over pairs of a p.
template <class S>
__device__ __forceinline__ float channel_gate(const MergeCall& call, const Shared<S>& s, int own, float sum) {
  const int c = channel_of<S>(own / 4 / kWarp, own / 4 % kWarp) + own % 4;
  if (c >= S::channels(call)) return 1.0f;
  return __fadd_rn(1.0f, gate_of(__fmaf_rn(call.gate_weight[c], sum, __fmul_rn(call.gate_bias[c], s.gate_sums()[1]))));
}

/// w1 and w2 of the image into shared memory. Ends with a barrier.
template <class S>
__device__ __forceinline__ void gates_of_block(const MergeCall& call, int image, const Shared<S>& s, int warp,
                                               int lane) {
  constexpr int kOwned = (S::kPositions + S::kThreads - 1) / S::kThreads;
  float sum[kOwned] = {};
#pragma unroll 1
  for (int base = 0; base < call.merged; base += S::kSlots) {
    const int count = min(S::kSlots, call.merged - base);
    // No loop around this: the compiler would read rows ahead of it, and spill.
    if (warp < count) gate_pair<S, 1>(call, image, s, base + warp, s.gate_row(warp), lane);
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
    if (own < S::kPositions) s.channel_gate()[own] = channel_gate<S>(call, s, own, sum[n]);
  }
  __syncthreads();
}

/// The same by a cluster: each of its blocks takes every kSharers-th pair, adds up the rows of all pairs over its share
/// of the channels, in the plan's order too, and tells the others. Begins with the wait for arrive(kSharers), ends with
/// a barrier of the cluster.
template <class S>
__device__ __forceinline__ void gates_of_cluster(const MergeCall& call, int image, const Shared<S>& s, int warp,
                                                 int lane) {
  constexpr int kSharers = S::kSharers, kShare = S::kShare, kReaders = S::kThreads / kShare;
  const int rank = int(blockIdx.x) % kSharers, own = threadIdx.x % kShare, reader = threadIdx.x / kShare;
  float* column = s.gate_columns(call.tokens) + own;
  float sum = 0;
  await_arrivals(kSharers);
#pragma unroll 1
  for (int base = 0; base < call.merged; base += S::kSlots * kSharers) {
    const int count = min(S::kSlots * kSharers, call.merged - base), i = base + warp * kSharers + rank;
    if (base > 0) barrier(kSharers);  // the others have read the last round's rows
    if (warp < S::kSlots && i < call.merged) gate_pair<S, kSharers>(call, image, s, i, s.gate_row(warp), lane);
    barrier(kSharers);
    for (int j = reader; reader < kReaders && j < count; j += kReaders)
      column[j * kShare] = of_block(s.gate_row(j / kSharers), j % kSharers, kSharers)[rank * kShare + own];
    __syncthreads();
    if (reader > 0) continue;
#pragma unroll 8
    for (int j = 0; j < count; ++j) sum = __fadd_rn(sum, column[j * kShare]);
  }
  if (reader == 0) {
    const float gate = channel_gate<S>(call, s, rank * kShare + own, sum);
#pragma unroll
    for (int block = 0; block < kSharers; ++block)
      of_block(s.channel_gate(), block, kSharers)[rank * kShare + own] = gate;
  }
  barrier(kSharers);
}

template <class S>
__device__ __forceinline__ void compute_gates(const MergeCall& call, int image, const Shared<S>& s, bool together,
                                              int warp, int lane) {
  if constexpr (S::kMayShare) {
    if (together) return gates_of_cluster<S>(call, image, s, warp, lane);
  }
  gates_of_block<S>(call, image, s, warp, lane);
}

}  // namespace
}  // namespace pyra::kernels::cuda
