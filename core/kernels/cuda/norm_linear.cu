// y = LayerNorm(x) Wᵀ + b for a few rows: the head of a small batch, in one launch instead of two.
//
// A warp owns a feature, eight of them a block. It holds the feature's weights in registers before the kernel in front
// has ended (dependent.cuh); then the block's warps normalise the rows into shared memory, every block all of them, and
// each warp multiplies. Bytes moved: W once, the rows once for every block from L2. A head of 1000 classes of 768
// channels is 3 MB, 125 blocks.
#include "kernels/cuda/norm_linear.h"

#include "kernels/cuda/dependent.cuh"
#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kMostRows = 8, kMostValues = 48;  // of a lane, beside as many weights
static_assert(kMostRows * kMostValues * kWarp * 4 <= 48 << 10, "needs no permission for its shared memory");

struct NormLinearJob {
  LayerNormCall norm;
  const float *weight, *bias, *residual;
  float* y;
  int out;
};

template <class In, class Row>
__global__ void __launch_bounds__(kWarps* kWarp) norm_linear_kernel(const NormLinearJob job) {
  constexpr int kWidth = kVectorOf<In, float>, kValues = Row::kValues;
  extern __shared__ float4 memory[];
  auto* normalised = reinterpret_cast<float*>(memory);  // [rows,channels]
  const int channels = Row::channels(job.norm.channels);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int feature = int(blockIdx.x) * kWarps + warp;

  float weight[kValues] = {};
  const float* from = job.weight + int64_t(min(feature, job.out - 1)) * channels;
#pragma unroll
  for (int v = 0; v < kValues; v += kWidth) {
    const int c = (v / kWidth * kWarp + lane) * kWidth;
    float vector[kWidth];
    load_floats<float, kWidth>(from + (c < channels ? c : 0), vector);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) weight[v + e] = vector[e];
  }
  const float bias = job.bias && feature < job.out ? job.bias[feature] : 0;
  fetch_ahead(job.norm.weight, channels);
  fetch_ahead(job.norm.bias, channels);
  admit_next();
  await_earlier();

  for (int r = warp; r < job.norm.rows; r += kWarps) {
    RawRow<In, kValues, kWidth> raw;
    raw.load(static_cast<const In*>(job.norm.x) + r * job.norm.row_stride, channels, lane);
    float rows[1][kValues];
#pragma unroll
    for (int v = 0; v < kValues; ++v) rows[0][v] = raw.value(v);
    normalise<kWidth>(rows[0], channels, job.norm.eps, lane);
    store_affine<float, kWidth>(rows, job.norm.weight, job.norm.bias, channels, lane, normalised + r * channels, 0);
  }
  __syncthreads();
  if (feature >= job.out) return;
  for (int r = 0; r < job.norm.rows; ++r) {
    float product[kValues] = {};
#pragma unroll
    for (int v = 0; v < kValues; v += kWidth) {
      const int c = (v / kWidth * kWarp + lane) * kWidth;
      if (c >= channels) break;
      float x[kWidth];
      load_floats<float, kWidth>(normalised + r * channels + c, x);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) product[v + e] = __fmul_rn(x[e], weight[v + e]);
    }
    const float sum = __fadd_rn(warp_sum(lane_sum(product)), bias);
    if (lane > 0) continue;
    const int64_t to = int64_t(r) * job.out + feature;
    job.y[to] = job.residual ? __fadd_rn(job.residual[to], sum) : sum;
  }
}

bool suits(const LayerNormCall& norm, const LinearCall& layer) {
  return norm.rows > 0 && norm.rows <= kMostRows && norm.channels <= kMostValues * kWarp &&
         norm.compute == DType::fp32 && layer.compute == DType::fp32 && layer.result == DType::fp32 &&
         layer.epilogue == Epilogue::none && !layer.transposed && !layer.activation && !layer.x_stride &&
         !layer.weight_stride && !layer.y_stride;
}

}  // namespace

bool norm_linear(const LayerNormCall& norm, const LinearCall& layer, cudaStream_t stream) {
  constexpr const char* kWho = "norm_linear";
  if (!suits(norm, layer)) return false;
  check_layer_norm(norm);
  if (layer.rows != norm.rows || layer.in != norm.channels || layer.out < 1 || layer.x != norm.y)
    fail(ExitCode::internal, kWho, ": ", norm.rows, " rows of ", norm.channels, " channels for a layer of [",
         layer.rows, ",", layer.in, "] x [", layer.out, ",", layer.in, "]ᵀ");
  check_pointer(kWho, "weight", layer.weight);
  check_pointer(kWho, "y", layer.y);
  const NormLinearJob job{norm,
                          static_cast<const float*>(layer.weight),
                          static_cast<const float*>(layer.bias),
                          static_cast<const float*>(layer.residual),
                          static_cast<float*>(layer.y),
                          layer.out};
  const LaunchShape shape{dim3(unsigned((layer.out + kWarps - 1) / kWarps)), kWarps * kWarp,
                          size_t(norm.rows) * size_t(norm.channels) * 4};
  with_type(norm.residual, [&](auto in) {
    with_row_shape(norm.channels, [&](auto row) {
      using Row = decltype(row);
      if constexpr (Row::kValues <= kMostValues)
        launch_dependent<&norm_linear_kernel<decltype(in), Row>>(shape, stream, job);
    });
  });
  return true;
}

}  // namespace pyra::kernels::cuda
