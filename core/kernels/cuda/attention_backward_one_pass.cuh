// The gradient of attention on sm_90a: five products, P and dS made once.
//
// Heads of up to 64 tokens, OneTile: a block is one warpgroup and owns a head, whose rows are queries: S = Q Kᵀ and
// dP = dO Vᵀ are two chains of wgmma into registers, so that whole rows are there and rowsum(dO ∘ out), which is
// rowsum(P ∘ dP), needs neither out nor a second look at dO. dS, packed where it lies, is the left operand of dQ = dS
// K; P and dS go to shared memory too, swizzled, and are read as columns for dV = Pᵀ dO and dK = dSᵀ Q.
//
// Heads of up to 208 tokens, Panels: a block has a warpgroup for every 64 keys and goes from head to head. A
// warpgroup's rows are its keys. It goes over chunks of 32 queries: Sᵀ = K Qᵀ and dPᵀ = V dOᵀ into registers, then Pᵀ,
// packed where it lies, is the left operand of dV += Pᵀ dO, issued together with the next chunk's S and dP, and dSᵀ
// goes to shared memory, in panels of 64 queries (a row is a key, 128 bytes). When dS of the warpgroup is there,
// dK = dSᵀ Q; when that of all is there, the warpgroup makes dQ = dS K of 64 queries from one panel, read as columns.
// The copy engine brings dO and V of the block's next head once all have their dV, and Q and K once all have their
// dQ; rowsum(dO ∘ out) is made from global memory meanwhile.
//
// Every sum has one order, columns ascend, in one warpgroup's registers: a head's result depends on nothing else.
// Operands are kept in whole multiples of 16 rows. A tile or a chunk that reaches past them reads what lies behind:
// rows of products that are not stored, or numbers that P and dS, which are 0 there, make nothing of. For the latter
// they must be finite, so what a chunk can reach is the operand behind.
//
// Bytes moved: qkv, out (not for OneTile) and dO once, d_qkv once: B N 8C elements, or 7C. Work: 10 B H N² D
// operations. Shared memory at 208 rows: operands 104 KB, dS 104 KB, one block of four warpgroups on a multiprocessor;
// at 128 rows 97 KB, two blocks of two. OneTile: 25, 37 or 49 KB and 7, 5 or 4 blocks.
#pragma once
#include "kernels/cuda/attention_backward_terms.cuh"
#include "kernels/cuda/attention_hopper.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kChunk = 32;  ///< queries of Panels at a time

struct BackwardJob {
  CUtensorMap qkv_rows, d_out_rows;  ///< as [image, row, channel], in boxes of `rows` rows of a head
  const float *sizes, *log_sum;
  const void *out, *d_out;
  void* d_qkv;
  int tokens, heads;
  int all_heads;  ///< of all images
  int rows;       ///< of each operand in shared memory
  float scale;    ///< of a product of q and k, to powers of two
  float factor;   ///< of dQ and dK: 1 / sqrt(D)
};

/// Blocks of OneTile wanted on a multiprocessor: as many as registers allow without spills.
[[maybe_unused]] constexpr int blocks_for(int rows) {
  return rows > 48 ? 4 : rows > 32 ? 5 : 7;
}
/// And of Panels: as many as shared memory allows.
[[maybe_unused]] constexpr int blocks_of(int groups) {
  return groups > 2 ? 1 : 2;
}

/// The operands' `Keys` rows, the last of them as zeros, P and dS likewise, a term of every key, barriers.
template <int Keys>
struct OneTileShape {
  static constexpr int kBytes = Keys * kRowBytes, kTermsAt = 6 * kBytes, kBarriersAt = kTermsAt + Keys * 4;
  static constexpr int kShared = kBarriersAt + 2 * 8;
  static_assert(kBytes % 1024 == 0);
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/// Where a head lies in the tensors.
struct HeadPlace {
  int image, head, channels;
  size_t row0;  ///< the image's first row
  __device__ __forceinline__ HeadPlace(const BackwardJob& job, int of_all)
      : image(of_all / job.heads),
        head(of_all % job.heads),
        channels(job.heads * kHeadDim),
        row0(size_t(image) * job.tokens) {}
  [[nodiscard]] __device__ __forceinline__ const float* sizes(const BackwardJob& job) const {
    return job.sizes == nullptr ? nullptr : job.sizes + row0;
  }
  [[nodiscard]] __device__ __forceinline__ const float* log_sum(const BackwardJob& job) const {
    return job.log_sum + (size_t(image) * job.heads + head) * job.tokens;
  }
  /// Of dQ; those of dK and dV are `channels` and twice as many further.
  template <class T>
  [[nodiscard]] __device__ __forceinline__ T* grad(const BackwardJob& job) const {
    return static_cast<T*>(job.d_qkv) + row0 * 3 * channels + head * kHeadDim;
  }
  /// Two operands, to be complete when the barrier's phase is.
  __device__ __forceinline__ void load_queries_and_keys(const BackwardJob& job, void* q, void* k,
                                                        uint64_t* there) const {
    expect_bytes(there, 2 * job.rows * kRowBytes);
    copy_box(q, &job.qkv_rows, head * kHeadDim, 0, image, there);
    copy_box(k, &job.qkv_rows, channels + head * kHeadDim, 0, image, there);
  }
  __device__ __forceinline__ void load_gradients_and_values(const BackwardJob& job, void* d_out, void* v,
                                                            uint64_t* there) const {
    expect_bytes(there, 2 * job.rows * kRowBytes);
    copy_box(d_out, &job.d_out_rows, head * kHeadDim, 0, image, there);
    copy_box(v, &job.qkv_rows, 2 * channels + head * kHeadDim, 0, image, there);
  }
};

/// A thread's two rows of a gradient, `own` and 8 further, as far as they exist.
template <class T>
__device__ __forceinline__ void store_rows(const BackwardJob& job, T* to, const float (&grad)[kHeadDim / 2], int own,
                                           float factor) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = own + 8 * half;
    store_half(to + size_t(row) * (3 * job.heads * kHeadDim), grad, half, factor, row < job.tokens);
  }
}

/// S and dP of up to 64 queries and `Keys` keys, and then P and dS; [4i], [4i + 1] of a thread belong to its first row.
template <class T, int Keys>
struct OneTile {
  float p[Keys / 2], ds[Keys / 2];
  uint32_t slopes[Keys / 16][4];  ///< dS as wgmma wants its left operand

  /// Issues S or dP, and closes its group.
  static __device__ __forceinline__ void issue(float (&to)[Keys / 2], uint64_t queries, uint64_t keys) {
    open_multiplications();
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) multiply_transposed<T, Keys>(to, queries + 2 * d, keys + 2 * d, d > 0);
    close_multiplications();
  }

  /// S to P, which goes to the warp's `rows` in shared memory too.
  __device__ __forceinline__ void raise(unsigned char* rows, const float* key_terms, const float (&shift)[2],
                                        float scale) {
#pragma unroll
    for (int block = 0; block < Keys / 16; ++block) {
      uint32_t weights[4];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int tile = 2 * block + part;
        const float2 term = *reinterpret_cast<const float2*>(key_terms + 8 * tile + 2 * (threadIdx.x % 4));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* one = p + 4 * tile + 2 * half;
          one[0] = exp2_fast(fmaf(one[0], scale, term.x + shift[half]));
          one[1] = exp2_fast(fmaf(one[1], scale, term.y + shift[half]));
          weights[2 * part + half] = pack_pair(T{}, one[0], one[1]);
        }
      }
      store_block(rows, block, weights);
    }
  }

  /// dP to dS, which goes to the warp's `rows` in shared memory too.
  __device__ __forceinline__ void slope(unsigned char* rows) {
    float delta[2] = {};
#pragma unroll
    for (int i = 0; i < Keys / 2; ++i) delta[i / 2 % 2] = fmaf(p[i], ds[i], delta[i / 2 % 2]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta[half] += __shfl_xor_sync(kAllLanes, delta[half], 1);
      delta[half] += __shfl_xor_sync(kAllLanes, delta[half], 2);
    }
#pragma unroll
    for (int i = 0; i < Keys / 4; ++i) {
      const float d = delta[i % 2];
      slopes[i / 4][i % 4] = pack_pair(T{}, p[2 * i] * (ds[2 * i] - d), p[2 * i + 1] * (ds[2 * i + 1] - d));
    }
#pragma unroll
    for (int block = 0; block < Keys / 16; ++block) store_block(rows, block, slopes[block]);
  }
};

template <class T, int Keys>
__global__ void __launch_bounds__(kGroup, blocks_for(Keys))
    attend_backward_tile(const __grid_constant__ BackwardJob job) {
  using Shape = OneTileShape<Keys>;
  constexpr bool kTogether = Keys > 48;  // two gradients under way at once, where that costs no block
  extern __shared__ __align__(1024) unsigned char shared[];
  unsigned char *q = shared, *d_out = q + Shape::kBytes, *k = d_out + Shape::kBytes, *v = k + Shape::kBytes;
  unsigned char *weights = v + Shape::kBytes, *slopes = weights + Shape::kBytes;
  auto* key_terms = reinterpret_cast<float*>(shared + Shape::kTermsAt);
  auto* logits_there = reinterpret_cast<uint64_t*>(shared + Shape::kBarriersAt);
  uint64_t* values_there = logits_there + 1;
  const HeadPlace place(job, blockIdx.x);
  if (threadIdx.x == 0) {
    start_barrier(logits_there);
    start_barrier(values_there);
    publish_barriers();
    place.load_queries_and_keys(job, q, k, logits_there);
    place.load_gradients_and_values(job, d_out, v, values_there);
  }
  const int warp_row = threadIdx.x / kWarp * 16, own = warp_row + threadIdx.x % kWarp / 4;
  const bool wanted = warp_row < Keys;
  const float shift[2] = {query_term(place.log_sum(job), own, job.tokens),
                          query_term(place.log_sum(job), own + 8, job.tokens)};
  if (threadIdx.x < Keys) key_terms[threadIdx.x] = key_term(place.sizes(job), threadIdx.x, job.tokens);
  __syncthreads();

  OneTile<T, Keys> tile;
  await_phase(logits_there, 0);
  tile.issue(tile.p, describe(q), describe(k));
  await_phase(values_there, 0);
  tile.issue(tile.ds, describe(d_out), describe(v));
  await_all_but<1>();
  hold_back(tile.p);
  if (wanted) tile.raise(weights + warp_row * kRowBytes, key_terms, shift, job.scale);
  await_all_but<0>();
  hold_back(tile.ds);
  if (wanted) {
    tile.slope(slopes + warp_row * kRowBytes);
    publish_stores();
  } else {
#pragma unroll
    for (int i = 0; i < Keys / 4; ++i) tile.slopes[i / 4][i % 4] = 0;
  }

  T* grad = place.grad<T>(job);
  const bool stored = warp_row < job.tokens;
  const auto issue_columns = [](float(&to)[kHeadDim / 2], uint64_t columns, uint64_t rows) {
    open_multiplications();
#pragma unroll
    for (int i = 0; i < Keys / 16; ++i)
      multiply_shared<T, true>(to, columns + (i * 16 * kRowBytes >> 4), rows + (i * 16 * kRowBytes >> 4), i > 0);
    close_multiplications();
  };
  float q_grad[kHeadDim / 2], v_grad[kHeadDim / 2], k_grad[kHeadDim / 2];
  open_multiplications();
#pragma unroll
  for (int i = 0; i < Keys / 16; ++i)
    multiply<T>(q_grad, tile.slopes[i], describe(k) + (i * 16 * kRowBytes >> 4), i > 0);
  close_multiplications();
  __syncthreads();  // P and dS of all queries are there
  if (kTogether) issue_columns(v_grad, describe(weights), describe(d_out));
  await_all_but<kTogether>();
  hold_back(q_grad);
  if (stored) store_rows(job, grad, q_grad, own, job.factor);
  if (!kTogether) issue_columns(v_grad, describe(weights), describe(d_out));
  if (kTogether) issue_columns(k_grad, describe(slopes), describe(q));
  await_all_but<kTogether>();
  hold_back(v_grad);
  if (stored) store_rows(job, grad + 2 * place.channels, v_grad, own, 1.f);
  if (!kTogether) issue_columns(k_grad, describe(slopes), describe(q));
  await_all_but<0>();
  hold_back(k_grad);
  if (stored) store_rows(job, grad + place.channels, k_grad, own, job.factor);
}

/// What a block of Panels has in shared memory: the operands' rows, dS, a term of every query and key, barriers. Found
/// anew where it is needed: registers are dear.
struct PanelHead {
  unsigned char* shared;
  int bytes;    ///< of an operand, or a panel of dS
  int columns;  ///< queries, in whole chunks
  int panels;
  [[nodiscard]] __device__ __forceinline__ unsigned char* q() const { return shared; }
  [[nodiscard]] __device__ __forceinline__ unsigned char* d_out() const { return shared + bytes; }
  [[nodiscard]] __device__ __forceinline__ unsigned char* k() const { return shared + 2 * bytes; }
  [[nodiscard]] __device__ __forceinline__ unsigned char* v() const { return shared + 3 * bytes; }
  [[nodiscard]] __device__ __forceinline__ unsigned char* panel(int i) const { return shared + (4 + i) * bytes; }
  [[nodiscard]] __device__ __forceinline__ float* query_terms() const {
    return reinterpret_cast<float*>(panel(panels));
  }
  [[nodiscard]] __device__ __forceinline__ float* key_terms() const { return query_terms() + columns; }
  [[nodiscard]] __device__ __forceinline__ float* delta() const { return query_terms() + 2 * columns; }
  [[nodiscard]] __device__ __forceinline__ uint64_t* logits_there() const {
    return reinterpret_cast<uint64_t*>(query_terms() + 3 * columns);
  }
  [[nodiscard]] __device__ __forceinline__ uint64_t* values_there() const { return logits_there() + 1; }

  template <class T>
  __device__ __forceinline__ void load_terms(const BackwardJob& job, const HeadPlace& place) const {
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
      query_terms()[i] = query_term(place.log_sum(job), i, job.tokens);
      key_terms()[i] = key_term(place.sizes(job), i, job.tokens);
    }
    const size_t at = place.row0 * place.channels + place.head * kHeadDim;
    load_delta<T, kHeadDim>({static_cast<const T*>(job.out) + at, place.channels},
                            {static_cast<const T*>(job.d_out) + at, place.channels}, 0, columns, job.tokens, delta());
  }
};

/// A warpgroup's tile of 64 keys, from row `first`, of which the warp's are `warp_row` and 15 more.
template <class T>
struct PanelTile {
  float p[kChunk / 2], ds[kChunk / 2];  ///< S and dP, before they become P and dS

  __device__ __forceinline__ void issue_chunk(const PanelHead& head, int first, int column) {
    const uint64_t k = describe(head.k() + first * kRowBytes), v = describe(head.v() + first * kRowBytes);
    const uint64_t q = describe(head.q() + column * kRowBytes), d_out = describe(head.d_out() + column * kRowBytes);
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) multiply_transposed<T, kChunk>(p, k + 2 * d, q + 2 * d, d > 0);
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) multiply_transposed<T, kChunk>(ds, v + 2 * d, d_out + 2 * d, d > 0);
  }

  /// p and ds become P, of which `weights` are what wgmma wants as its left operand, and dS, which goes to its panel.
  __device__ __forceinline__ void weigh(const PanelHead& head, int warp_row, int column, const float (&shift)[2],
                                        float scale, uint32_t (&weights)[kChunk / 16][4]) {
    unsigned char* rows = head.panel(column / kTile) + warp_row * kRowBytes;
#pragma unroll
    for (int block = 0; block < kChunk / 16; ++block) {
      uint32_t slopes[4];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int tile = 2 * block + part, at = column + 8 * tile + 2 * (threadIdx.x % 4);
        const float2 term = *reinterpret_cast<const float2*>(head.query_terms() + at);
        const float2 delta = *reinterpret_cast<const float2*>(head.delta() + at);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float *one = p + 4 * tile + 2 * half, *slope = ds + 4 * tile + 2 * half;
          const float even = exp2_fast(fmaf(one[0], scale, term.x + shift[half]));
          const float odd = exp2_fast(fmaf(one[1], scale, term.y + shift[half]));
          weights[block][2 * part + half] = pack_pair(T{}, even, odd);
          slopes[2 * part + half] = pack_pair(T{}, even * (slope[0] - delta.x), odd * (slope[1] - delta.y));
        }
      }
      store_block(rows, column % kTile / 16 + block, slopes);
    }
  }

  /// Leaves dV in `v_grad`, and dS in the panels.
  __device__ __forceinline__ void run(const BackwardJob& job, const PanelHead& head, int first, int warp_row,
                                      float (&v_grad)[kHeadDim / 2]) {
    const bool wanted = warp_row < job.rows;
    const int own = warp_row + threadIdx.x % kWarp / 4;
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) shift[half] = wanted ? head.key_terms()[own + 8 * half] : 0.f;
      // p and ds too are set: registers that a product may read count as taken since the head before.
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) v_grad[i] = 0.f;
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) p[i] = ds[i] = 0.f;
    open_multiplications();
    issue_chunk(head, first, 0);
    await_multiplications();
    hold_back(p);
    hold_back(ds);
#pragma unroll 1
    for (int column = 0; column < job.tokens; column += kChunk) {
      uint32_t weights[kChunk / 16][4];
      if (wanted) {
        weigh(head, warp_row, column, shift, job.scale, weights);
      } else {
#pragma unroll
        for (int i = 0; i < kChunk / 4; ++i) weights[i / 4][i % 4] = 0;
      }
      const uint64_t d_out = describe(head.d_out() + column * kRowBytes);
      open_multiplications();
#pragma unroll
      for (int i = 0; i < kChunk / 16; ++i) multiply<T>(v_grad, weights[i], d_out + (i * 16 * kRowBytes >> 4), true);
      if (column + kChunk < job.tokens) issue_chunk(head, first, column + kChunk);
      await_multiplications();
      hold_back(v_grad);
      hold_back(p);
      hold_back(ds);
    }
  }
};

/// Until the warpgroup's threads have met.
__device__ __forceinline__ void await_group(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
}

template <class T, int Groups>
__global__ void __launch_bounds__(Groups* kGroup, blocks_of(Groups))
    attend_backward_panels(const __grid_constant__ BackwardJob job) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const PanelHead head{shared, job.rows * kRowBytes, round_up(job.tokens, kChunk), Groups};
  const int group = threadIdx.x / kGroup, first = group * kTile;
  const int warp_row = threadIdx.x / kWarp * 16, own = warp_row + threadIdx.x % kWarp / 4;
  const bool stored = warp_row < job.tokens;
  if (threadIdx.x == 0) {
    start_barrier(head.logits_there());
    start_barrier(head.values_there());
    publish_barriers();
    const HeadPlace place(job, blockIdx.x);
    place.load_gradients_and_values(job, head.d_out(), head.v(), head.values_there());
    place.load_queries_and_keys(job, head.q(), head.k(), head.logits_there());
  }
  head.load_terms<T>(job, HeadPlace(job, blockIdx.x));
  __syncthreads();
#pragma unroll 1
  for (int at = blockIdx.x, round = 0; at < job.all_heads; at += gridDim.x, ++round) {
    const HeadPlace place(job, at);
    const bool more = at + gridDim.x < unsigned(job.all_heads), loads = more && threadIdx.x == 0;
    T* grad = place.grad<T>(job);
    await_phase(head.values_there(), round);
    await_phase(head.logits_there(), round);
    float v_grad[kHeadDim / 2], k_grad[kHeadDim / 2], q_grad[kHeadDim / 2];
    {
      PanelTile<T> tile;
      tile.run(job, head, first, warp_row, v_grad);
    }
    publish_stores();
    await_group(group);  // dS of the warpgroup's keys is there
    const auto add_queries = [&](int row) {
      multiply_shared<T, false>(k_grad, describe(head.panel(row / kTile) + first * kRowBytes) + row % kTile / 8,
                                describe(head.q() + row * kRowBytes), row > 0);
    };
    open_multiplications();
    add_queries(0);
#pragma unroll 1
    for (int row = 16; row < job.rows; row += 16) add_queries(row);
    close_multiplications();
    if (stored) store_rows(job, grad + 2 * place.channels, v_grad, own, 1.f);
    __syncthreads();  // dS is there, and no warpgroup needs dO, V or the terms any more
    if (loads)
      HeadPlace(job, at + gridDim.x).load_gradients_and_values(job, head.d_out(), head.v(), head.values_there());
    const auto add_keys = [&](int row) {
      multiply_shared<T, true>(q_grad, describe(head.panel(group) + row * kRowBytes),
                               describe(head.k() + row * kRowBytes), row > 0);
    };
    open_multiplications();
    add_keys(0);
#pragma unroll 1
    for (int row = 16; row < job.rows; row += 16) add_keys(row);
    close_multiplications();
    if (more) head.load_terms<T>(job, HeadPlace(job, at + gridDim.x));
    await_all_but<1>();
    hold_back(k_grad);
    if (stored) store_rows(job, grad + place.channels, k_grad, own, job.factor);
    await_all_but<0>();
    hold_back(q_grad);
    __syncthreads();  // nor dS, Q or K; the next head's terms are there
    if (loads) HeadPlace(job, at + gridDim.x).load_queries_and_keys(job, head.q(), head.k(), head.logits_there());
    if (stored) store_rows(job, grad, q_grad, own, job.factor);
  }
}

#else

/// Stand for the kernels where the code is not for sm_90a; their bounds tell the host.
template <class T, int Keys>
__global__ void __launch_bounds__(kWarp) attend_backward_tile(const __grid_constant__ BackwardJob) {}
template <class T, int Groups>
__global__ void __launch_bounds__(kWarp) attend_backward_panels(const __grid_constant__ BackwardJob) {}

#endif

}  // namespace
}  // namespace pyra::kernels::cuda
