// LayerNorm of rows, y = (x - mean) / sqrt(var + eps) * weight + bias, and the mean over tokens.
//
// layer_norm: a warp owns a row, or two where rows are plenty: their loads are in flight together, and weight and bias,
// which cost L1 more cycles than the rows themselves, are read once for both. Moves rows * C * (in + out) bytes.
// mean_of_tokens: a block owns 32 vectors of channels of an image; each of its warps adds every eighth token, and the
// eight sums are added in order. Reads the tokens once.
#include "kernels/cuda/layer_norm.h"

#include "kernels/cuda/dependent.cuh"
#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kWarps = 4;

template <class In, class Out, class Row, int kRows>
__global__ void __launch_bounds__(kWarps* kWarp) norm_kernel(const LayerNormCall call) {
  constexpr int kWidth = kVectorOf<In, Out>, kValues = Row::kValues;
  const int channels = Row::channels(call.channels);
  const int lane = threadIdx.x % kWarp;
  const int64_t first = (int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kRows;
  if (first >= call.rows) return;
  fetch_ahead(call.weight, channels);
  fetch_ahead(call.bias, channels);
  admit_next();
  await_earlier();
  const In* x = static_cast<const In*>(call.x);
  RawRow<In, kValues, kWidth> raw[kRows];  // a last odd row twice, also written twice
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r < call.rows ? first + r : first;
    raw[r].load(x + row * call.row_stride, channels, lane);
  }
  float rows[kRows][kValues];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) rows[r][v] = raw[r].value(v);
    normalise<kWidth>(rows[r], channels, call.eps, lane);
  }
  store_affine<Out, kWidth>(rows, call.weight, call.bias, channels, lane, static_cast<Out*>(call.y) + first * channels,
                            first + 1 < call.rows ? channels : 0);
}

template <class In, class Out, class Row, int kRows>
void launch_norm(const LayerNormCall& call, cudaStream_t stream) {
  constexpr int kRowsOfBlock = kWarps * kRows;
  const int blocks = int((int64_t(call.rows) + kRowsOfBlock - 1) / kRowsOfBlock);
  launch_dependent<&norm_kernel<In, Out, Row, kRows>>({dim3(unsigned(blocks)), kWarps * kWarp}, stream, call);
}

constexpr int kTokenGroups = 8;

template <class T>
__global__ void __launch_bounds__(kTokenGroups* kWarp)
    mean_kernel(const T* x, int tokens, int first, int channels, float* out) {
  constexpr int kWidth = 16 / sizeof(T), kColumns = kWarp * kWidth;
  __shared__ float sums[kTokenGroups][kColumns];
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  const int64_t image = blockIdx.x;
  const int begin = blockIdx.y * kColumns, c = begin + lane * kWidth;
  // Lanes beyond the row read its start: no branch around the loads, and their sums are not used.
  const T* column = x + image * tokens * channels + (c < channels ? c : 0);
  float sum[kWidth] = {};
#pragma unroll 8
  for (int t = first + group; t < tokens; t += kTokenGroups) {
    float value[kWidth];
    load_floats<T, kWidth>(column + int64_t(t) * channels, value);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sum[e] += value[e];
  }
  store_floats<float, kWidth>(&sums[group][lane * kWidth], sum);
  __syncthreads();
  const int own = threadIdx.x;
  if (own >= kColumns || begin + own >= channels) return;
  float total = 0;
#pragma unroll
  for (int g = 0; g < kTokenGroups; ++g) total += sums[g][own];
  out[image * channels + begin + own] = quotient(total, float(tokens - first));
}

}  // namespace

void check_layer_norm(const LayerNormCall& call) {
  constexpr const char* kWho = "layer_norm";
  check_channels(kWho, call.channels);
  check_dtype(kWho, call.residual);
  check_dtype(kWho, call.compute);
  if (call.rows < 0) fail(ExitCode::usage, kWho, ": ", call.rows, " rows");
  if (call.row_stride < 0 || (call.rows > 1 && call.row_stride < call.channels) ||
      call.row_stride * int64_t(size_of(call.residual)) % 16 != 0)
    fail(ExitCode::usage, kWho, ": rows of ", call.channels, " channels ", call.row_stride,
         " elements apart; expected no overlap and a multiple of 16 bytes");
  if (call.rows == 0) return;
  check_pointer(kWho, "x", call.x);
  check_pointer(kWho, "weight", call.weight);
  check_pointer(kWho, "bias", call.bias);
  check_pointer(kWho, "y", call.y);
}

void layer_norm(const LayerNormCall& call, cudaStream_t stream) {
  check_layer_norm(call);
  if (call.rows == 0) return;
  // Two rows a warp only where that still leaves every multiprocessor some 16 warps.
  const bool many = call.rows >= 32 * multiprocessors();
  with_type(call.residual, [&](auto in) {
    with_type(call.compute, [&](auto out) {
      with_row_shape(call.channels, [&](auto row) {
        using In = decltype(in);
        using Out = decltype(out);
        using Row = decltype(row);
        if constexpr (Row::kValues <= 32) {
          if (many) return launch_norm<In, Out, Row, 2>(call, stream);
        }
        launch_norm<In, Out, Row, 1>(call, stream);
      });
    });
  });
}

void mean_of_tokens(const void* x, DType residual, int batch, int tokens, int first, int channels, float* out,
                    cudaStream_t stream) {
  constexpr const char* kWho = "mean_of_tokens";
  check_channels(kWho, channels);
  check_dtype(kWho, residual);
  if (batch < 0 || first < 0 || first >= tokens)
    fail(ExitCode::usage, kWho, ": tokens from ", first, " on of ", tokens, ", ", batch, " images");
  if (batch == 0) return;
  check_pointer(kWho, "x", x);
  check_pointer(kWho, "out", out);
  with_type(residual, [&](auto type) {
    using T = decltype(type);
    constexpr int kColumns = kWarp * 16 / int(sizeof(T));
    const dim3 grid(unsigned(batch), unsigned((channels + kColumns - 1) / kColumns));
    mean_kernel<T><<<grid, kTokenGroups * kWarp, 0, stream>>>(static_cast<const T*>(x), tokens, first, channels, out);
  });
  PYRA_CUDA_LAUNCHED();
}

}  // namespace pyra::kernels::cuda
