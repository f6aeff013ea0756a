// LayerNorm in training: x += scale * branch and y = LayerNorm(x), its gradient, and both for the rows a head reads.
//
// A warp owns a row and holds it in registers (row.cuh): sums go over lanes in one fixed order, so a row's result is
// its own, bit for bit. What is kept of the forward pass is the normalised row, rounded to the compute type, and
// 1/deviation: backward then needs neither the stream nor its statistics again. Bytes moved a channel, bf16: add_norm 4
// + 4 (stream), 2 (branch), 2 + 2 (normalised, y); norm_backward 2 + 2 + 4 + 4
// + 2; scale_rows 4 + 2.
// Tried and lost: a LoRA term of rank 8 within them, forward and back, which saves a pass over y and two over its
// gradient (H200, ViT-B, dense: 5 418 and 6 122 images/s at 32 and 128 with it, 5 481 and 6 151 without): registers go
// from 72 to 118, and what it saves ran beside other work or from the L2.
#include "kernels/cuda/norm_train.h"

#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kWarps = 4;

[[nodiscard]] __device__ __forceinline__ float scale_of(const float* scale, int row, int rows_per_image) {
  return scale ? scale[row / rows_per_image] : 1.0f;
}

template <class T, class Row, bool kNorm>
__global__ void __launch_bounds__(kWarps* kWarp) add_norm_kernel(const AddNormCall call) {
  constexpr int kWidth = kVectorOf<float, T>, kValues = Row::kValues;
  const int channels = Row::channels(call.channels), lane = threadIdx.x % kWarp;
  const int row = int(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp;
  if (row >= call.rows) return;
  const int64_t at = int64_t(row) * channels;
  RawRow<float, kValues, kWidth> raw;
  raw.load(call.x + at, channels, lane);
  float rows[1][kValues];
  auto& x = rows[0];
#pragma unroll
  for (int v = 0; v < kValues; ++v) x[v] = raw.value(v);
  if (call.branch) {
    RawRow<T, kValues, kWidth> branch;
    branch.load(static_cast<const T*>(call.branch) + at, channels, lane);
    const float scale = scale_of(call.branch_scale, row, call.rows_per_image);
#pragma unroll
    for (int v = 0; v < kValues; ++v) x[v] = __fmaf_rn(scale, branch.value(v), x[v]);
    store_row<float, kWidth>(call.x + at, x, channels, lane);
  }
  if constexpr (kNorm) {
    const float inverse = normalise<kWidth>(x, channels, call.eps, lane);
    store_row<T, kWidth>(static_cast<T*>(call.normalised) + at, x, channels, lane);
    if (lane == 0) call.inverse_deviation[row] = inverse;
    store_affine<T, kWidth>(rows, call.weight, call.bias, channels, lane,
                            static_cast<T*>(call.y) + int64_t(row) * call.y_stride, 0);
  }
}

/// The two means that LayerNorm's gradient subtracts, from g = d_y * weight and the normalised row.
template <int kWidth, int kValues, class Normalised>
__device__ __forceinline__ void subtract_means(float (&g)[kValues], const Normalised& normalised, int channels,
                                               int lane) {
  float products[kValues];
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    const bool inside = (v / kWidth * kWarp + lane) * kWidth < channels;
    if (!inside) g[v] = 0;
    products[v] = inside ? __fmul_rn(g[v], normalised(v)) : 0.0f;
  }
  const float mean = quotient(warp_sum(lane_sum(g)), float(channels));
  const float slope = quotient(warp_sum(lane_sum(products)), float(channels));
#pragma unroll
  for (int v = 0; v < kValues; ++v) g[v] = __fmaf_rn(-normalised(v), slope, __fsub_rn(g[v], mean));
}

template <class T, class Row>
__global__ void __launch_bounds__(kWarps* kWarp) norm_backward_kernel(const NormBackwardCall call) {
  constexpr int kWidth = kVectorOf<float, T>, kValues = Row::kValues;
  const int channels = Row::channels(call.channels), lane = threadIdx.x % kWarp;
  const int row = int(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp;
  if (row >= call.rows) return;
  const int64_t at = int64_t(row) * channels;
  RawRow<T, kValues, kWidth> d_y, normalised;
  RawRow<float, kValues, kWidth> d_x;
  d_y.load(static_cast<const T*>(call.d_y) + int64_t(row) * call.d_y_stride, channels, lane);
  normalised.load(static_cast<const T*>(call.normalised) + at, channels, lane);
  d_x.load(call.d_x + at, channels, lane);
  const float inverse = call.inverse_deviation[row];
  float g[kValues];
#pragma unroll
  for (int j = 0; j < kValues / kWidth; ++j) {
    const int c = (j * kWarp + lane) * kWidth;
    pace<kValues>(j);
    float weight[kWidth];
    load_floats<float, kWidth>(call.weight + (c < channels ? c : 0), weight);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) g[j * kWidth + e] = __fmul_rn(d_y.value(j * kWidth + e), weight[e]);
  }
  subtract_means<kWidth>(
      g, [&](int v) { return normalised.value(v); }, channels, lane);
#pragma unroll
  for (int v = 0; v < kValues; ++v) g[v] = __fmaf_rn(inverse, g[v], d_x.value(v));
  store_row<float, kWidth>(call.d_x + at, g, channels, lane);
  if (!call.d_branch) return;
  const float scale = scale_of(call.branch_scale, row, call.rows_per_image);
#pragma unroll
  for (int v = 0; v < kValues; ++v) g[v] = __fmul_rn(g[v], scale);
  store_row<T, kWidth>(static_cast<T*>(call.d_branch) + at, g, channels, lane);
}

template <class T, class Row>
__global__ void __launch_bounds__(kWarps* kWarp) scale_rows_kernel(const ScaleRowsCall call) {
  constexpr int kWidth = kVectorOf<float, T>, kValues = Row::kValues;
  const int channels = Row::channels(call.channels), lane = threadIdx.x % kWarp;
  const int row = int(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp;
  if (row >= call.rows) return;
  const int64_t at = int64_t(row) * channels;
  RawRow<float, kValues, kWidth> d_x;
  d_x.load(call.d_x + at, channels, lane);
  const float scale = scale_of(call.branch_scale, row, call.rows_per_image);
  float out[kValues];
#pragma unroll
  for (int v = 0; v < kValues; ++v) out[v] = __fmul_rn(d_x.value(v), scale);
  store_row<T, kWidth>(static_cast<T*>(call.out) + at, out, channels, lane);
}

template <class Row>
__global__ void __launch_bounds__(kWarps* kWarp) norm_rows_kernel(const NormRowsCall call) {
  constexpr int kWidth = kVectorOf<float, float>, kValues = Row::kValues;
  const int channels = Row::channels(call.channels), lane = threadIdx.x % kWarp;
  const int row = int(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp;
  if (row >= call.rows) return;
  RawRow<float, kValues, kWidth> raw;
  raw.load(call.x + int64_t(row) * call.x_stride, channels, lane);
  float rows[1][kValues];
#pragma unroll
  for (int v = 0; v < kValues; ++v) rows[0][v] = raw.value(v);
  const float inverse = normalise<kWidth>(rows[0], channels, call.eps, lane);
  const int64_t at = int64_t(row) * channels;
  store_row<float, kWidth>(call.normalised + at, rows[0], channels, lane);
  if (lane == 0) call.inverse_deviation[row] = inverse;
  store_affine<float, kWidth>(rows, call.weight, call.bias, channels, lane, call.y + at, 0);
}

/// A block owns an image. Every warp computes the gradient of the one normalised row, then writes its share of the
/// tokens: that costs less than a second launch would.
template <class Row>
__global__ void __launch_bounds__(kWarps* kWarp) norm_rows_backward_kernel(const NormRowsBackwardCall call) {
  constexpr int kWidth = kVectorOf<float, float>, kValues = Row::kValues;
  const int channels = Row::channels(call.channels), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int image = blockIdx.x;
  const int64_t at = int64_t(image) * channels;
  RawRow<float, kValues, kWidth> d_y, normalised;
  d_y.load(call.d_y + at, channels, lane);
  normalised.load(call.normalised + at, channels, lane);
  const float inverse = call.inverse_deviation[image];
  float g[kValues], zero[kValues];
#pragma unroll
  for (int j = 0; j < kValues / kWidth; ++j) {
    const int c = (j * kWarp + lane) * kWidth;
    float weight[kWidth];
    load_floats<float, kWidth>(call.weight + (c < channels ? c : 0), weight);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) g[j * kWidth + e] = __fmul_rn(d_y.value(j * kWidth + e), weight[e]);
  }
  subtract_means<kWidth>(
      g, [&](int v) { return normalised.value(v); }, channels, lane);
  const float share = call.pooled ? quotient(inverse, float(call.tokens - call.first)) : inverse;
#pragma unroll
  for (int v = 0; v < kValues; ++v) g[v] = __fmul_rn(g[v], share), zero[v] = 0;
  for (int token = int(blockIdx.y) * kWarps + warp; token < call.tokens; token += int(gridDim.y) * kWarps) {
    const bool read = call.pooled ? token >= call.first : token == call.first;
    float* to = call.d_x + (int64_t(image) * call.tokens + token) * channels;
    if (read)
      store_row<float, kWidth>(to, g, channels, lane);
    else
      store_row<float, kWidth>(to, zero, channels, lane);
  }
}

void check_rows(const char* who, int rows, int channels, int rows_per_image) {
  check_channels(who, channels);
  if (rows < 0 || rows_per_image < 1) fail(ExitCode::usage, who, ": ", rows, " rows, ", rows_per_image, " an image");
}

void check_stride(const char* who, const char* name, int64_t stride, int channels, size_t size) {
  if (stride < channels || stride * int64_t(size) % 16 != 0)
    fail(ExitCode::usage, who, ": rows of ", name, " are ", stride, " elements apart; expected at least ", channels,
         " and a multiple of 16 bytes");
}

[[nodiscard]] unsigned blocks_of(int rows) {
  return unsigned((rows + kWarps - 1) / kWarps);
}

}  // namespace

void add_norm(const AddNormCall& call, cudaStream_t stream) {
  constexpr const char* kWho = "add_norm";
  check_rows(kWho, call.rows, call.channels, call.rows_per_image);
  check_dtype(kWho, call.compute);
  if (call.rows == 0 || (!call.y && !call.branch)) return;
  check_pointer(kWho, "x", call.x);
  if (call.branch) check_pointer(kWho, "branch", call.branch);
  if (call.y) {
    check_stride(kWho, "y", call.y_stride, call.channels, size_of(call.compute));
    check_pointer(kWho, "y", call.y);
    check_pointer(kWho, "normalised", call.normalised);
    check_pointer(kWho, "inverse_deviation", call.inverse_deviation);
    check_pointer(kWho, "weight", call.weight);
    check_pointer(kWho, "bias", call.bias);
  }
  with_type(call.compute, [&](auto type) {
    with_row_shape(call.channels, [&](auto row) {
      using T = decltype(type);
      using Row = decltype(row);
      if (call.y)
        add_norm_kernel<T, Row, true><<<blocks_of(call.rows), kWarps * kWarp, 0, stream>>>(call);
      else
        add_norm_kernel<T, Row, false><<<blocks_of(call.rows), kWarps * kWarp, 0, stream>>>(call);
    });
  });
  PYRA_CUDA_LAUNCHED();
}

void norm_backward(const NormBackwardCall& call, cudaStream_t stream) {
  constexpr const char* kWho = "norm_backward";
  check_rows(kWho, call.rows, call.channels, call.rows_per_image);
  check_dtype(kWho, call.compute);
  if (call.rows == 0) return;
  check_stride(kWho, "d_y", call.d_y_stride, call.channels, size_of(call.compute));
  check_pointer(kWho, "d_y", call.d_y);
  check_pointer(kWho, "normalised", call.normalised);
  check_pointer(kWho, "inverse_deviation", call.inverse_deviation);
  check_pointer(kWho, "weight", call.weight);
  check_pointer(kWho, "d_x", call.d_x);
  if (call.d_branch) check_pointer(kWho, "d_branch", call.d_branch);
  with_type(call.compute, [&](auto type) {
    with_row_shape(call.channels, [&](auto row) {
      norm_backward_kernel<decltype(type), decltype(row)><<<blocks_of(call.rows), kWarps * kWarp, 0, stream>>>(call);
    });
  });
  PYRA_CUDA_LAUNCHED();
}

void scale_rows(const ScaleRowsCall& call, cudaStream_t stream) {
  constexpr const char* kWho = "scale_rows";
  check_rows(kWho, call.rows, call.channels, call.rows_per_image);
  check_dtype(kWho, call.compute);
  if (call.rows == 0) return;
  check_pointer(kWho, "d_x", call.d_x);
  check_pointer(kWho, "out", call.out);
  with_type(call.compute, [&](auto type) {
    with_row_shape(call.channels, [&](auto row) {
      scale_rows_kernel<decltype(type), decltype(row)><<<blocks_of(call.rows), kWarps * kWarp, 0, stream>>>(call);
    });
  });
  PYRA_CUDA_LAUNCHED();
}

void norm_rows(const NormRowsCall& call, cudaStream_t stream) {
  constexpr const char* kWho = "norm_rows";
  check_rows(kWho, call.rows, call.channels, 1);
  if (call.rows == 0) return;
  check_stride(kWho, "x", call.x_stride, call.channels, sizeof(float));
  check_pointer(kWho, "x", call.x);
  check_pointer(kWho, "weight", call.weight);
  check_pointer(kWho, "bias", call.bias);
  check_pointer(kWho, "normalised", call.normalised);
  check_pointer(kWho, "inverse_deviation", call.inverse_deviation);
  check_pointer(kWho, "y", call.y);
  with_row_shape(call.channels, [&](auto row) {
    norm_rows_kernel<decltype(row)><<<blocks_of(call.rows), kWarps * kWarp, 0, stream>>>(call);
  });
  PYRA_CUDA_LAUNCHED();
}

void norm_rows_backward(const NormRowsBackwardCall& call, cudaStream_t stream) {
  constexpr const char* kWho = "norm_rows_backward";
  check_channels(kWho, call.channels);
  if (call.batch < 0 || call.first < 0 || call.first >= call.tokens)
    fail(ExitCode::usage, kWho, ": token ", call.first, " of ", call.tokens, ", ", call.batch, " images");
  if (call.batch == 0) return;
  check_pointer(kWho, "d_y", call.d_y);
  check_pointer(kWho, "normalised", call.normalised);
  check_pointer(kWho, "inverse_deviation", call.inverse_deviation);
  check_pointer(kWho, "weight", call.weight);
  check_pointer(kWho, "d_x", call.d_x);
  constexpr int kTokensOfBlock = 8 * kWarps;
  const dim3 grid(unsigned(call.batch), unsigned((call.tokens + kTokensOfBlock - 1) / kTokensOfBlock));
  with_row_shape(call.channels, [&](auto row) {
    norm_rows_backward_kernel<decltype(row)><<<grid, kWarps * kWarp, 0, stream>>>(call);
  });
  PYRA_CUDA_LAUNCHED();
}

}  // namespace pyra::kernels::cuda
