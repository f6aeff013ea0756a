// From images to the residual stream.
//
// extract_patches: uint8 images: a block owns a band of `patch` image rows, one contiguous piece both of the image and
// of the result; it reads the band into shared memory 16 bytes at a time, and a thread turns 8 pixels of it into 8
// values of each channel, so that neighbouring threads write neighbouring 16 bytes. Where a patch is not a multiple of
// 8 wide, where a band is too large, and for fp32 images a thread makes 8 neighbouring values of the result straight
// from the image. Moves S*S*3 bytes (12 for fp32) in and S*S*3 elements out of each image.
// assemble_tokens: a warp owns a token, of two neighbouring images where tokens are plenty: positions, weight and bias
// are then read once for both. Moves rows * C * (embedded + x + y) bytes.
// gelu_erf: a thread owns two vectors of 16 bytes. Moves every value in and out once; erff's arithmetic is of the same
// order as that traffic.
#include "kernels/cuda/embed.h"

#include "kernels/cuda/dependent.cuh"
#include "kernels/cuda/row.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPatchVector = 8;
constexpr size_t kBandBytes = 48 << 10;

/// A channel's normalisation. Divisions are by constants: one correction step makes them exact, hence equal to the
/// CPU's (tests compare bit for bit).
struct Normaliser {
  float mean[3], std[3], inverse[3];

  [[nodiscard]] __device__ __forceinline__ static float exact(float x, float y, float inverse) {
    const float first = __fmul_rn(x, inverse);
    return __fmaf_rn(__fmaf_rn(-y, first, x), inverse, first);
  }
  [[nodiscard]] __device__ __forceinline__ float operator()(uint32_t value, int channel) const {
    const float scaled = exact(float(value), 255.0f, 1.0f / 255.0f);
    return exact(__fsub_rn(scaled, pick(mean, channel)), pick(std, channel), pick(inverse, channel));
  }
  /// Without an address: that would put the array into local memory.
  [[nodiscard]] __device__ __forceinline__ static float pick(const float (&of)[3], int channel) {
    return channel == 0 ? of[0] : channel == 1 ? of[1] : of[2];
  }
};

/// Band `blockIdx.x` of image `blockIdx.y`; patch a multiple of 8.
template <class T>
__global__ void __launch_bounds__(kThreads)
    band_kernel(const uint8_t* images, T* out, int side, int patch, const Normaliser normaliser) {
  extern __shared__ uint4 band[];
  const int64_t pieces = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  const int row_bytes = side * 3, bytes = patch * row_bytes;
  const auto* from = reinterpret_cast<const uint4*>(images + pieces * bytes);
#pragma unroll 4
  for (int i = threadIdx.x; i < bytes / 16; i += kThreads) band[i] = from[i];
  __syncthreads();

  const int groups_of_row = patch / kPatchVector, groups_of_patch = patch * groups_of_row;
  const int groups = side / patch * groups_of_patch;
  T* to = out + pieces * bytes;
  for (int i = threadIdx.x; i < groups; i += kThreads) {
    const int number = i / groups_of_patch, within = i % groups_of_patch;
    const int row = within / groups_of_row, column = within % groups_of_row * kPatchVector;
    const auto* pixels = reinterpret_cast<const char*>(band) + row * row_bytes + (number * patch + column) * 3;
    uint32_t words[6];
#pragma unroll
    for (int w = 0; w < 3; ++w) {
      const uint2 pair = reinterpret_cast<const uint2*>(pixels)[w];
      words[2 * w] = pair.x;
      words[2 * w + 1] = pair.y;
    }
    T* first = to + (int64_t(number) * 3 * patch + row) * patch + column;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      float values[kPatchVector];
#pragma unroll
      for (int e = 0; e < kPatchVector; ++e) {
        const int byte = e * 3 + c;
        values[e] = normaliser((words[byte / 4] >> (byte % 4 * 8)) & 0xffu, c);
      }
      store_floats<T, kPatchVector>(first + c * patch * patch, values);
    }
  }
}

/// kCount neighbouring values of the result a thread.
template <class T, class Source, int kCount>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const Source* images, T* out, int64_t values, int side, int patch, const Normaliser normaliser) {
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (first >= values) return;
  const int of_patch = 3 * patch * patch, patches_of_row = side / patch;
  int64_t number = first / of_patch;
  const int within = int(first % of_patch);
  int channel = within / (patch * patch), row = within / patch % patch, column = within % patch;
  int patch_column = int(number % patches_of_row), patch_row = int(number / patches_of_row % patches_of_row);
  int64_t image = number / patches_of_row / patches_of_row;
  float result[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    const int y = patch_row * patch + row, x = patch_column * patch + column;
    if constexpr (sizeof(Source) == 1) {
      result[e] = normaliser(images[((image * side + y) * side + x) * 3 + channel], channel);
    } else {
      result[e] = images[((image * 3 + channel) * side + y) * side + x];
    }
    if (e + 1 == kCount || ++column < patch) continue;
    column = 0;
    if (++row < patch) continue;
    row = 0;
    if (++channel < 3) continue;
    channel = 0;
    if (++patch_column < patches_of_row) continue;
    patch_column = 0;
    if (++patch_row < patches_of_row) continue;
    patch_row = 0;
    ++image;
  }
  store_floats<T, kCount>(out + first, result);
}

template <class T, class Source, int kCount>
void launch_gather(const PatchCall& call, const Normaliser& normaliser, int64_t values, cudaStream_t stream) {
  const int64_t blocks = (values / kCount + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) fail(ExitCode::usage, "extract_patches: a batch of ", call.batch, " is too large");
  gather_kernel<T, Source, kCount><<<unsigned(blocks), kThreads, 0, stream>>>(
      static_cast<const Source*>(call.images), static_cast<T*>(call.out), values, call.side, call.patch, normaliser);
}

template <class T>
void launch_patches(const PatchCall& call, const Normaliser& normaliser, cudaStream_t stream) {
  const int64_t values = int64_t(call.batch) * call.side * call.side * 3;
  const size_t band = size_t(call.patch) * size_t(call.side) * 3;
  const bool eights = values % kPatchVector == 0;
  if (call.is_float) {
    if (eights) return launch_gather<T, float, kPatchVector>(call, normaliser, values, stream);
    return launch_gather<T, float, 1>(call, normaliser, values, stream);
  }
  if (call.patch % kPatchVector == 0 && band <= kBandBytes && call.batch <= 65535) {
    const dim3 grid(unsigned(call.side / call.patch), unsigned(call.batch));
    band_kernel<T><<<grid, kThreads, band, stream>>>(static_cast<const uint8_t*>(call.images),
                                                     static_cast<T*>(call.out), call.side, call.patch, normaliser);
    return;
  }
  if (eights) return launch_gather<T, uint8_t, kPatchVector>(call, normaliser, values, stream);
  launch_gather<T, uint8_t, 1>(call, normaliser, values, stream);
}

constexpr int kTokenWarps = 4;

/// Token `t` of kImages images, from image blockIdx.y * kImages on.
template <class Residual, class Compute, class Row, int kImages>
__global__ void __launch_bounds__(kTokenWarps* kWarp) assemble_kernel(const AssembleCall call) {
  constexpr int kWidth = kVectorOf<Residual, Compute>, kValues = Row::kValues;
  const int channels = Row::channels(call.channels), lane = threadIdx.x % kWarp;
  const int tokens = call.protected_tokens + call.patches, token = blockIdx.x * kTokenWarps + threadIdx.x / kWarp;
  if (token >= tokens) return;
  const int first = blockIdx.y * kImages, patch = token - call.protected_tokens;
  const auto image_of = [&](int n) { return first + n < call.batch ? first + n : first; };
  fetch_ahead(call.norm_weight, channels);
  fetch_ahead(call.norm_bias, channels);
  admit_next();
  await_earlier();
  if (blockIdx.y == 0)
    for (int i = token * kWarp + lane; i < call.tally_count; i += tokens * kWarp) call.tallies[i] = 0;
  float rows[kImages][kValues];
  const float* added = patch < 0 ? call.prefix + int64_t(token) * channels : call.positions + int64_t(patch) * channels;
  const auto* embedded = static_cast<const Compute*>(call.embedded);
#pragma unroll
  for (int j = 0; j < kValues / kWidth; ++j) {
    pace<kValues>(j);
    const int c = (j * kWarp + lane) * kWidth, from = c < channels ? c : 0;
    const auto constant = Words<float, kWidth>::read(added + from);
#pragma unroll
    for (int n = 0; n < kImages; ++n) {
      Words<Compute, kWidth> own;
      if (patch >= 0)
        own = Words<Compute, kWidth>::read(embedded + (int64_t(image_of(n)) * call.patches + patch) * channels + from);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const float value = constant.value(e);
        rows[n][j * kWidth + e] = patch < 0 ? value : __fadd_rn(own.value(e), value);
      }
    }
  }
  // A last odd image is computed and written twice.
  const int64_t to = (int64_t(first) * tokens + token) * channels;
  const int64_t stride = first + 1 < call.batch ? int64_t(tokens) * channels : 0;
#pragma unroll
  for (int n = 0; n < kImages; ++n) {
    store_row<Residual, kWidth>(static_cast<Residual*>(call.x) + to + n * stride, rows[n], channels, lane);
    normalise<kWidth>(rows[n], channels, call.norm_eps, lane);
  }
  store_affine<Compute, kWidth>(rows, call.norm_weight, call.norm_bias, channels, lane,
                                static_cast<Compute*>(call.y) + to, stride);
}

template <class Residual, class Compute, class Row, int kImages>
void launch_assemble(const AssembleCall& call, cudaStream_t stream) {
  const int tokens = call.protected_tokens + call.patches;
  const dim3 grid(unsigned((tokens + kTokenWarps - 1) / kTokenWarps), unsigned((call.batch + kImages - 1) / kImages));
  launch_dependent<&assemble_kernel<Residual, Compute, Row, kImages>>({grid, kTokenWarps * kWarp}, stream, call);
}

void check(const AssembleCall& call) {
  constexpr const char* kWho = "assemble_tokens";
  check_channels(kWho, call.channels);
  check_dtype(kWho, call.residual);
  check_dtype(kWho, call.compute);
  if (call.residual != DType::fp32 && call.residual != call.compute)
    fail(ExitCode::usage, kWho, ": a residual stream of 16 bits must be of the type computed in");
  if (call.batch < 0 || call.batch > 65535 || call.patches < 0 || call.protected_tokens < 0 ||
      call.patches + call.protected_tokens < 1)
    fail(ExitCode::usage, kWho, ": ", call.batch, " images of ", call.protected_tokens, " and ", call.patches,
         " tokens");
  if (call.batch == 0) return;
  if (call.patches > 0) {
    check_pointer(kWho, "embedded", call.embedded);
    check_pointer(kWho, "positions", call.positions);
  }
  if (call.protected_tokens > 0) check_pointer(kWho, "prefix", call.prefix);
  check_pointer(kWho, "x", call.x);
  check_pointer(kWho, "y", call.y);
  check_pointer(kWho, "norm_weight", call.norm_weight);
  check_pointer(kWho, "norm_bias", call.norm_bias);
}

__device__ __forceinline__ float gelu(float x) {
  constexpr float kHalfRoot = 0.70710678118654752440f;
  return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.0f, erff(__fmul_rn(x, kHalfRoot))));
}

template <class T>
__global__ void __launch_bounds__(kThreads) gelu_kernel(T* y, int64_t count) {
  constexpr int kWidth = 16 / sizeof(T), kVectors = 2;
  const int64_t block = int64_t(blockIdx.x) * kThreads * kVectors * kWidth;
  Words<T, kWidth> raw[kVectors];
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int64_t at = block + (n * kThreads + int(threadIdx.x)) * kWidth;
    if (at + kWidth <= count) raw[n] = Words<T, kWidth>::read(y + at);
  }
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int64_t at = block + (n * kThreads + int(threadIdx.x)) * kWidth;
    if (at + kWidth <= count) {
      float value[kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) value[e] = gelu(raw[n].value(e));
      Words<T, kWidth>::of(value, 0).write(y + at);
    } else {
      for (int64_t i = at; i < count; ++i) y[i] = from_float<T>(gelu(to_float(y[i])));
    }
  }
}

}  // namespace

void extract_patches(const PatchCall& call, cudaStream_t stream) {
  constexpr const char* kWho = "extract_patches";
  check_dtype(kWho, call.compute);
  if (call.batch < 0 || call.patch < 1 || call.side < call.patch || call.side % call.patch != 0 || call.side > 16384)
    fail(ExitCode::usage, kWho, ": ", call.batch, " images of ", call.side, " pixels a side in patches of ",
         call.patch);
  if (call.batch == 0) return;
  check_pointer(kWho, "images", call.images);
  check_pointer(kWho, "out", call.out);
  Normaliser normaliser{};
  for (int c = 0; c < 3 && !call.is_float; ++c) {
    if (!(call.std[c] > 0)) fail(ExitCode::usage, kWho, ": std of channel ", c, " is ", call.std[c]);
    normaliser.mean[c] = call.mean[c];
    normaliser.std[c] = call.std[c];
    normaliser.inverse[c] = 1.0f / call.std[c];
  }
  with_type(call.compute, [&](auto compute) { launch_patches<decltype(compute)>(call, normaliser, stream); });
  PYRA_CUDA_LAUNCHED();
}

void assemble_tokens(const AssembleCall& call, cudaStream_t stream) {
  check(call);
  if (call.batch == 0) return;
  const bool many = int64_t(call.batch) * (call.protected_tokens + call.patches) >= 32 * int64_t(multiprocessors());
  with_row_shape(call.channels, [&](auto row) {
    with_type(call.compute, [&](auto compute) {
      using Row = decltype(row);
      using Compute = decltype(compute);
      const auto launch = [&](auto residual) {
        using Residual = decltype(residual);
        if constexpr (Row::kValues <= 32) {
          if (many) return launch_assemble<Residual, Compute, Row, 2>(call, stream);
        }
        launch_assemble<Residual, Compute, Row, 1>(call, stream);
      };
      if (call.residual == DType::fp32) return launch(float{});
      launch(Compute{});
    });
  });
}

void gelu_erf(void* y, DType dtype, int64_t count, cudaStream_t stream) {
  constexpr const char* kWho = "gelu_erf";
  check_dtype(kWho, dtype);
  if (count < 0) fail(ExitCode::usage, kWho, ": ", count, " values");
  if (count == 0) return;
  check_pointer(kWho, "y", y);
  const int64_t of_block = 2 * kThreads * 16 / int64_t(size_of(dtype)), blocks = (count + of_block - 1) / of_block;
  if (blocks > INT32_MAX) fail(ExitCode::usage, kWho, ": ", count, " values are too many");
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    gelu_kernel<T><<<unsigned(blocks), kThreads, 0, stream>>>(static_cast<T*>(y), count);
  });
  PYRA_CUDA_LAUNCHED();
}

}  // namespace pyra::kernels::cuda
