// The micro-kernels' interface: plain pointers, one thread, no allocation. Row-major; strides count elements.
// bf16 stands as uint16_t. Callers are ordinary C++; the functions are compiled per instruction set from one source
// (micro_*.cpp) and reached through micro().
#pragma once
#include <cstdint>

namespace pyra::kernels::simd {

/// The widest panel and the highest register tile of all instruction sets, for the size of buffers.
inline constexpr int64_t kWidestPanel = 32, kHighestTile = 12;

/// y = x · panels + low-rank term, then bias, GELU, row_scale, residual: the layer on `rows` rows.
struct GemmCall {
  const void* x = nullptr;  ///< fp32 or bf16 by the function called
  int64_t x_stride = 0, k = 0;
  const void* panels = nullptr;  ///< [k, n] packed, of x's type
  int64_t n = 0;
  /// Low-rank term: hidden [rows,rank] times low_panels ([rank,n] packed), fp32; summed before the rest.
  const float* hidden = nullptr;
  int64_t rank = 0;
  const float* low_panels = nullptr;
  const uint8_t* keep = nullptr;  ///< bits [rows,n] and a byte more: low-rank sums times keep_scale where 1, else 0
  int64_t keep_stride = 0;        ///< bytes a row
  float keep_scale = 1.0f;
  const float* bias = nullptr;  ///< [n]
  bool gelu = false;
  float* slope = nullptr;            ///< [rows,n]: GELU' is written there
  const float* row_scale = nullptr;  ///< [rows]
  const float* residual = nullptr;   ///< [rows,n]
  void* y = nullptr;                 ///< [rows,n], fp32 or bf16
  bool y_bf16 = false;
};

/// One head of one image: out = softmax(scale q kᵀ + bias) v. q, k and v [tokens,head_dim], rows `stride` apart.
struct AttentionCall {
  const void *q = nullptr, *k = nullptr, *v = nullptr;  ///< fp32 or bf16 by the function called
  int64_t stride = 0, tokens = 0, head_dim = 0;         ///< head_dim a multiple of 16
  float scale = 1.0f;
  const float* bias = nullptr;  ///< [padded_tokens]: log2(size), kPaddingBias in the padding
  void* out = nullptr;          ///< [tokens,head_dim], rows out_stride apart, of q's type
  int64_t out_stride = 0;
  float* log_sum = nullptr;          ///< [tokens] or null: log of each row's sum of exponentials
  float* class_row = nullptr;        ///< [tokens] or null: probabilities of query 0
  unsigned char* scratch = nullptr;  ///< attention_scratch bytes, 64-byte aligned
};

/// One head backward, all fp32: dq, dk, dv rows `stride` apart as q, k, v are; log_sum from forward.
struct AttentionBackwardCall {
  const float *q = nullptr, *k = nullptr, *v = nullptr, *dout = nullptr;
  int64_t stride = 0, out_stride = 0, tokens = 0, head_dim = 0;
  float scale = 1.0f;
  const float *bias = nullptr, *log_sum = nullptr;
  float *dq = nullptr, *dk = nullptr, *dv = nullptr;
  unsigned char* scratch = nullptr;  ///< attention_backward_scratch bytes, 64-byte aligned
};

/// Makes a padding key's probability 0, yet is finite.
inline constexpr float kPaddingBias = -1e30f;
/// Tokens rounded up to whole panels of any width.
static constexpr int64_t padded_tokens(int64_t tokens) {
  return (tokens + kWidestPanel - 1) / kWidestPanel * kWidestPanel;
}
/// Queries that backward takes at a time, so that their probabilities stay in a core's cache.
inline constexpr int64_t kQueryBlock = 252;

static constexpr int64_t attention_scratch(int64_t tokens, int64_t head_dim) {
  // Keys transposed, values (packed in bf16), logits and probabilities of one tile of queries.
  return 4 * (2 * padded_tokens(tokens) * head_dim + 2 * kHighestTile * padded_tokens(tokens));
}
static constexpr int64_t attention_backward_scratch(int64_t tokens, int64_t head_dim) {
  // Keys and values transposed, probabilities and their gradients of one block of queries.
  const int64_t block = tokens < kQueryBlock ? tokens : kQueryBlock;
  return 4 * (2 * padded_tokens(tokens) * head_dim + 2 * block * padded_tokens(tokens));
}

/// x [rows,c] fp32 -> y fp32 or bf16; mean and rstd [rows], or null.
struct LayerNormCall {
  const float *x = nullptr, *weight = nullptr, *bias = nullptr;
  int64_t c = 0;
  float eps = 0;
  void* y = nullptr;
  bool y_bf16 = false;
  float *mean = nullptr, *rstd = nullptr;
};

struct LayerNormBackwardCall {
  const void* dy = nullptr;  ///< fp32 or bf16
  bool dy_bf16 = false;
  const float *x = nullptr, *weight = nullptr, *mean = nullptr, *rstd = nullptr;
  int64_t c = 0;
  float* dx = nullptr;                         ///< or null
  float *dweight = nullptr, *dbias = nullptr;  ///< [c] each, added to; or null
};
/// Philox's state: key and the upper half of the counter.
struct PhiloxState {
  uint32_t key[2], high[2];
};
/// One instruction set's functions.
struct MicroKernels {
  int64_t panel;  ///< columns of a panel; see LinearWeights::Packed
  void (*gemm)(const GemmCall& call, int64_t rows);
  void (*attention)(const AttentionCall& call);
  void (*attention_backward)(const AttentionBackwardCall& call);
  void (*layer_norm)(const LayerNormCall& call, int64_t rows);
  void (*layer_norm_backward)(const LayerNormBackwardCall& call, int64_t rows);
  /// out = x as fp32.
  void (*widen)(const uint16_t* x, int64_t count, float* out);
  /// out = x rounded to nearest even.
  void (*narrow)(const float* x, int64_t count, uint16_t* out);
  /// out [rows,n] = dy * slope * row_scale; slope and row_scale may be null.
  void (*scale_rows)(const void* dy, bool dy_bf16, const float* slope, const float* row_scale, int64_t rows, int64_t n,
                     float* out);
  /// sums [m,n] += tᵀ z with t [rows,m], z [rows,n].
  void (*add_outer)(const float* t, const float* z, int64_t rows, int64_t m, int64_t n, float* sums);
  /// sums [n] += column sums of z [rows,n].
  void (*add_columns)(const float* z, int64_t rows, int64_t n, float* sums);
  /// Bits of `blocks` Philox blocks from `first` on, a byte a block: bit i is set if half-word i >= threshold.
  void (*dropout_bits)(const PhiloxState& random, uint64_t first, int64_t blocks, uint32_t threshold, uint8_t* bits);
  /// out = x * scale where the bit is set, else 0; x fp32 or bf16; bits have a byte more than count / 8.
  void (*mask)(const void* x, bool x_bf16, const uint8_t* bits, float scale, int64_t count, float* out);
};

extern const MicroKernels kAvx2;    // needs CpuKernel::avx2
extern const MicroKernels kAvx512;  // needs CpuKernel::avx512

/// Those that cpu_kernel() chose, which must not be CpuKernel::aten.
const MicroKernels& micro();

/// In bf16 throughout; need CpuKernel::avx512_bf16 and its panels.
void gemm_avx512_bf16(const GemmCall& call, int64_t rows);
void attention_avx512_bf16(const AttentionCall& call);

}  // namespace pyra::kernels::simd
