// DiffRate's reduction where no token leaves, its way back, and pooling of what is left, as described by soft_reduce.h.
//
// ranking_attention, sum of masks' gradients: a thread an element. Moves B H N fp32.
// soft_reduce: a warp owns the token of one rank. It looks through the image's destinations (at most 4 KB, from L1),
// lists the sources sent to it in shared memory, and adds their rows in the order of ranks. Reads every row once, a
// source's twice; writes every row once.
// soft_reduce_backward: a warp owns a rank too, and writes the row of the token that had it: its own gradient, as a
// share where it received, and its share of what its destination got. Reads N rows, and a destination's again for each
// source; writes N rows of fp32 and of the compute type.
// soft_mask_backward: a thread an element, then a thread a rank over all images, in their order.
// masked_mean: a thread a channel of an image, over its tokens; back: a warp a token.
// All are bound by memory; the largest moves 3 B N C fp32 and a few percent of a search's step.
#include "kernels/cuda/soft_reduce.h"

#include "base/error.h"
#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kMostTokens = 1024;

[[nodiscard]] unsigned blocks_for(int64_t items, int each) {
  return unsigned((items + each - 1) / each);
}

__global__ void __launch_bounds__(kThreads)
    ranking_kernel(const float* class_rows, const float* mask, int heads, int tokens, int64_t count, float* out) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= count) return;
  const int64_t image = item / tokens;
  const float mean = attention_mean(class_rows + image * heads * tokens, heads, tokens, int(item - image * tokens));
  out[item] = mask[item] < 0.5f ? -1.f : mean;
}

/// The token that has a rank.
__device__ __forceinline__ int token_of(const int32_t* keep, const int32_t* src, int kept, int tokens, int64_t image,
                                        int rank) {
  return rank < kept ? keep[image * kept + rank] : src[image * (tokens - kept) + rank - kept];
}

/// The sources that are sent to `rank`, in their order, to `list`; how many. By a whole warp.
__device__ __forceinline__ int list_sources(const int32_t* dst, int tail, int rank, uint16_t* list) {
  const int lane = int(threadIdx.x) % kWarp;
  int count = 0;
  for (int first = 0; first < tail; first += kWarp) {
    const int i = first + lane;
    const bool here = i < tail && dst[i] == rank;
    const unsigned all = __ballot_sync(kAllLanes, here);
    if (here) list[count + __popc(all & ((1u << lane) - 1u))] = uint16_t(i);
    count += __popc(all);
  }
  __syncwarp();
  return count;
}

/// The same without a list.
__device__ __forceinline__ int count_sources(const int32_t* dst, int tail, int rank) {
  const int lane = int(threadIdx.x) % kWarp;
  int count = 0;
  for (int first = 0; first < tail; first += kWarp)
    count += __popc(__ballot_sync(kAllLanes, first + lane < tail && dst[first + lane] == rank));
  return count;
}

/// What a source brings: its size after the cosine, at least 1 for the logarithm's sake.
__device__ __forceinline__ float brought(const SoftReduceCall& call, int64_t image, int i) {
  const int64_t at = image * (call.tokens - call.counts.kept) + i;
  return fmaxf(1.f, call.sizes[image * call.tokens + call.src[at]] * call.cosine[at]);
}

__device__ __forceinline__ float size_of_rank(const SoftReduceCall& call, int64_t image, int rank, int token,
                                              const uint16_t* sources, int count) {
  const SoftCounts& counts = call.counts;
  const float own = call.sizes[image * call.tokens + token];
  if (!counts.merges() || rank >= counts.pruned) return own;
  if (rank >= counts.kept) return brought(call, image, rank - counts.kept);
  float sum = fmaxf(1.f, own);
  for (int s = 0; s < count; ++s) sum += brought(call, image, sources[s]);
  return sum;
}

__global__ void __launch_bounds__(kThreads) reduce_kernel(const SoftReduceCall call) {
  __shared__ uint16_t lists[kWarps][kMostTokens];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t item = int64_t(blockIdx.x) * kWarps + warp;
  if (item >= int64_t(call.batch) * call.tokens) return;  // of the whole warp; no barrier of the block follows
  const SoftCounts& counts = call.counts;
  const int64_t image = item / call.tokens, others = call.tokens - counts.kept;
  const int rank = int(item - image * call.tokens);
  const int token = token_of(call.keep, call.src, counts.kept, call.tokens, image, rank);
  uint16_t* const sources = lists[warp];
  const int count = rank < counts.kept ? list_sources(call.dst + image * others, counts.tail(), rank, sources) : 0;
  if (lane == 0) {
    call.sizes_out[item] = size_of_rank(call, image, rank, token, sources, count);
    const bool survives = counts.survives_pruning(rank) && counts.survives_merging(rank);
    call.mask_out[item] = survives ? call.mask[image * call.tokens + token] : 0.f;
  }
  const float* const rows = call.x + image * call.tokens * call.channels;
  const float* const own = rows + int64_t(token) * call.channels;
  float* const to = call.x_out + item * call.channels;
  for (int c = 4 * lane; c < call.channels; c += 4 * kWarp) {
    float4 sum = *reinterpret_cast<const float4*>(own + c);
    for (int s = 0; s < count; ++s) {
      const int source = call.src[image * others + sources[s]];
      const float4 x = *reinterpret_cast<const float4*>(rows + int64_t(source) * call.channels + c);
      sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    }
    if (count > 0) {
      const float all = float(count + 1);
      sum = make_float4(sum.x / all, sum.y / all, sum.z / all, sum.w / all);
    }
    *reinterpret_cast<float4*>(to + c) = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) reduce_backward_kernel(const SoftReduceBackwardCall call) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t item = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp;
  if (item >= int64_t(call.batch) * call.tokens) return;  // of the whole warp
  const SoftCounts& counts = call.counts;
  const int64_t image = item / call.tokens, others = call.tokens - counts.kept;
  const int rank = int(item - image * call.tokens);
  const int token = token_of(call.keep, call.src, counts.kept, call.tokens, image, rank);
  const int32_t* const dst = call.dst + image * others;
  const bool sent = rank >= counts.kept && rank < counts.pruned;
  // Who is averaged, and of how many: the rank itself, or where a source went.
  const int mean = sent ? dst[rank - counts.kept] : rank;
  const int count = sent || rank < counts.kept ? count_sources(dst, counts.tail(), mean) : 0;
  const float share = 1.f / float(count + 1);
  const float* const own = call.d_out + item * call.channels;
  const float* const mixed = call.d_out + (image * call.tokens + mean) * call.channels;
  const int64_t to = (image * call.tokens + token) * call.channels;
  for (int c = 4 * lane; c < call.channels; c += 4 * kWarp) {
    const float4 m = *reinterpret_cast<const float4*>(mixed + c);
    float d[4] = {m.x * share, m.y * share, m.z * share, m.w * share};
    if (sent) {  // it stays behind as it was, too
      const float4 o = *reinterpret_cast<const float4*>(own + c);
      d[0] += o.x, d[1] += o.y, d[2] += o.z, d[3] += o.w;
    }
    store_floats<float, 4>(call.d_x + to + c, d);
    store_floats<T, 4>(static_cast<T*>(call.d_branch) + to + c, d);
  }
}

__global__ void __launch_bounds__(kThreads) mask_backward_kernel(const SoftMaskBackwardCall call) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= int64_t(call.batch) * call.tokens) return;
  const SoftCounts& counts = call.counts;
  const int64_t image = item / call.tokens;
  const int rank = int(item - image * call.tokens);
  float d = call.d_mask_out[item];
  if (call.d_mask_rows) {
    const float* row = call.d_mask_rows + image * call.heads * call.tokens + rank;
    float sum = 0.f;
    for (int head = 0; head < call.heads; ++head) sum += row[int64_t(head) * call.tokens];
    d += sum;
  }
  call.d_ranks[item] = d;
  const int token = token_of(call.keep, call.src, counts.kept, call.tokens, image, rank);
  const bool survives = counts.survives_pruning(rank) && counts.survives_merging(rank);
  call.d_mask[image * call.tokens + token] = survives ? d : 0.f;
}

/// d_ranks of all images times what the other factors of the mask are: each factor's gradient.
__global__ void __launch_bounds__(kThreads) survival_backward_kernel(const SoftMaskBackwardCall call) {
  const int rank = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (rank >= call.tokens) return;
  const SoftCounts& counts = call.counts;
  double sum = 0;
  for (int64_t image = 0; image < call.batch; ++image) {
    const int token = token_of(call.keep, call.src, counts.kept, call.tokens, image, rank);
    sum += double(call.d_ranks[image * call.tokens + rank]) * double(call.mask[image * call.tokens + token]);
  }
  const bool of_prune = counts.prunes() && rank < counts.present && counts.survives_merging(rank);
  const bool of_merge = counts.merges() && rank < counts.pruned && counts.survives_pruning(rank);
  call.d_prune[rank] = of_prune ? float(sum) : 0.f;
  call.d_merge[rank] = of_merge ? float(sum) : 0.f;
}

__global__ void __launch_bounds__(kThreads)
    masked_mean_kernel(const float* x, const float* mask, int tokens, int first, int channels, float* out) {
  const int c = int(blockIdx.y) * kThreads + int(threadIdx.x);
  if (c >= channels) return;
  const int64_t image = blockIdx.x;
  const float* column = x + image * tokens * channels + c;
  float sum = 0.f, weight = 0.f;
#pragma unroll 4
  for (int t = first; t < tokens; ++t) {
    const float m = mask[image * tokens + t];
    sum = fmaf(m, column[int64_t(t) * channels], sum);
    weight += m;
  }
  out[image * channels + c] = sum / weight;
}

__global__ void __launch_bounds__(kThreads) masked_mean_backward_kernel(const MaskedMeanBackwardCall call) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t item = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp;
  if (item >= int64_t(call.batch) * call.tokens) return;  // of the whole warp
  const int64_t image = item / call.tokens;
  const int token = int(item - image * call.tokens);
  float weight = 0.f;
  for (int t = call.first + lane; t < call.tokens; t += kWarp) weight += call.mask[image * call.tokens + t];
  weight = warp_sum(weight);
  const bool pooled = token >= call.first;
  const float share = pooled ? call.mask[item] / weight : 0.f;
  const float *x = call.x + item * call.channels, *mean = call.mean + image * call.channels,
              *d_mean = call.d_mean + image * call.channels;
  float along = 0.f;
  for (int c = lane; c < call.channels; c += kWarp) {
    along = fmaf(d_mean[c], x[c] - mean[c], along);
    call.d_x[item * call.channels + c] = d_mean[c] * share;
  }
  along = warp_sum(along);
  if (lane == 0) call.d_mask[item] = pooled ? along / weight : 0.f;
}

void check_tokens(const char* who, int batch, int tokens) {
  if (batch < 0 || tokens < 1 || tokens > kMostTokens)
    fail(ExitCode::usage, who, ": ", batch, " images of ", tokens, " tokens; expected 1 to ", kMostTokens, " tokens");
}

void check_counts(const char* who, const SoftCounts& counts, int tokens) {
  if (!(1 <= counts.kept && counts.kept <= counts.pruned && counts.pruned <= counts.present &&
        counts.present <= tokens))
    fail(ExitCode::usage, who, ": kept ", counts.kept, ", pruned ", counts.pruned, " and present ", counts.present,
         " of ", tokens, " tokens; expected them to rise in this order from 1 on");
}

/// The ranking's pointers: there is something behind the kept ones only where not all are kept.
void check_ranking(const char* who, const int32_t* keep, const int32_t* src, const SoftCounts& counts, int tokens) {
  check_pointer(who, "keep", keep);
  if (counts.kept < tokens) check_pointer(who, "src", src);
}

}  // namespace

void ranking_attention(const float* class_rows, const float* mask, int batch, int heads, int tokens, float* out,
                       cudaStream_t stream) {
  constexpr const char* kWho = "ranking_attention";
  check_tokens(kWho, batch, tokens);
  if (heads < 1) fail(ExitCode::usage, kWho, ": ", heads, " heads");
  if (batch == 0) return;
  check_pointer(kWho, "class_rows", class_rows);
  check_pointer(kWho, "mask", mask);
  check_pointer(kWho, "out", out);
  const int64_t count = int64_t(batch) * tokens;
  ranking_kernel<<<blocks_for(count, kThreads), kThreads, 0, stream>>>(class_rows, mask, heads, tokens, count, out);
  PYRA_CUDA_LAUNCHED();
}

void soft_reduce(const SoftReduceCall& call, cudaStream_t stream) {
  constexpr const char* kWho = "soft_reduce";
  check_tokens(kWho, call.batch, call.tokens);
  check_channels(kWho, call.channels);
  check_counts(kWho, call.counts, call.tokens);
  if (call.batch == 0) return;
  check_ranking(kWho, call.keep, call.src, call.counts, call.tokens);
  if (call.counts.merges()) {
    check_pointer(kWho, "dst", call.dst);
    check_pointer(kWho, "cosine", call.cosine);
  }
  check_pointer(kWho, "x", call.x);
  check_pointer(kWho, "sizes", call.sizes);
  check_pointer(kWho, "mask", call.mask);
  check_pointer(kWho, "x_out", call.x_out);
  check_pointer(kWho, "sizes_out", call.sizes_out);
  check_pointer(kWho, "mask_out", call.mask_out);
  reduce_kernel<<<blocks_for(int64_t(call.batch) * call.tokens, kWarps), kThreads, 0, stream>>>(call);
  PYRA_CUDA_LAUNCHED();
}

void soft_reduce_backward(const SoftReduceBackwardCall& call, cudaStream_t stream) {
  constexpr const char* kWho = "soft_reduce_backward";
  check_tokens(kWho, call.batch, call.tokens);
  check_channels(kWho, call.channels);
  check_counts(kWho, call.counts, call.tokens);
  check_dtype(kWho, call.compute);
  if (call.batch == 0) return;
  check_ranking(kWho, call.keep, call.src, call.counts, call.tokens);
  if (call.counts.merges()) check_pointer(kWho, "dst", call.dst);
  check_pointer(kWho, "d_out", call.d_out);
  check_pointer(kWho, "d_x", call.d_x);
  check_pointer(kWho, "d_branch", call.d_branch);
  with_type(call.compute, [&](auto type) {
    reduce_backward_kernel<decltype(type)>
        <<<blocks_for(int64_t(call.batch) * call.tokens, kWarps), kThreads, 0, stream>>>(call);
  });
  PYRA_CUDA_LAUNCHED();
}

void soft_mask_backward(const SoftMaskBackwardCall& call, cudaStream_t stream) {
  constexpr const char* kWho = "soft_mask_backward";
  check_tokens(kWho, call.batch, call.tokens);
  check_counts(kWho, call.counts, call.tokens);
  if (call.heads < 1) fail(ExitCode::usage, kWho, ": ", call.heads, " heads");
  check_ranking(kWho, call.keep, call.src, call.counts, call.tokens);
  check_pointer(kWho, "mask", call.mask);
  check_pointer(kWho, "d_mask_out", call.d_mask_out);
  check_pointer(kWho, "d_ranks", call.d_ranks);
  check_pointer(kWho, "d_mask", call.d_mask);
  if (!call.d_prune || !call.d_merge) fail(ExitCode::usage, kWho, ": d_prune or d_merge is null");
  if (call.batch > 0)
    mask_backward_kernel<<<blocks_for(int64_t(call.batch) * call.tokens, kThreads), kThreads, 0, stream>>>(call);
  survival_backward_kernel<<<blocks_for(call.tokens, kThreads), kThreads, 0, stream>>>(call);
  PYRA_CUDA_LAUNCHED();
}

void masked_mean(const float* x, const float* mask, int batch, int tokens, int first, int channels, float* out,
                 cudaStream_t stream) {
  constexpr const char* kWho = "masked_mean";
  check_tokens(kWho, batch, tokens);
  check_channels(kWho, channels);
  if (first < 0 || first >= tokens) fail(ExitCode::usage, kWho, ": tokens from ", first, " on of ", tokens);
  if (batch == 0) return;
  check_pointer(kWho, "x", x);
  check_pointer(kWho, "mask", mask);
  check_pointer(kWho, "out", out);
  const dim3 grid(unsigned(batch), blocks_for(channels, kThreads));
  masked_mean_kernel<<<grid, kThreads, 0, stream>>>(x, mask, tokens, first, channels, out);
  PYRA_CUDA_LAUNCHED();
}

void masked_mean_backward(const MaskedMeanBackwardCall& call, cudaStream_t stream) {
  constexpr const char* kWho = "masked_mean_backward";
  check_tokens(kWho, call.batch, call.tokens);
  check_channels(kWho, call.channels);
  if (call.first < 0 || call.first >= call.tokens)
    fail(ExitCode::usage, kWho, ": tokens from ", call.first, " on of ", call.tokens);
  if (call.batch == 0) return;
  check_pointer(kWho, "x", call.x);
  check_pointer(kWho, "mask", call.mask);
  check_pointer(kWho, "mean", call.mean);
  check_pointer(kWho, "d_mean", call.d_mean);
  check_pointer(kWho, "d_x", call.d_x);
  check_pointer(kWho, "d_mask", call.d_mask);
  masked_mean_backward_kernel<<<blocks_for(int64_t(call.batch) * call.tokens, kWarps), kThreads, 0, stream>>>(call);
  PYRA_CUDA_LAUNCHED();
}

}  // namespace pyra::kernels::cuda
