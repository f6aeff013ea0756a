// A row of channels in the registers of one warp, and its LayerNorm: what merge, layer_norm and embed share.
// Lane l of the warp owns, of every chunk of 32 vectors, vector l: channels (32 chunk + l) width + 0..width-1. The sums
// below follow from this layout alone, so a row's result depends on that row only, whichever kernel or instance runs.
#pragma once
#include <type_traits>

#include "base/error.h"
#include "kernels/cuda/device.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kMaxChannels = 4096;

/// Elements a lane reads at once: 16 bytes of the wider type, so that neither is accessed with gaps between lanes.
template <class A, class B>
constexpr int kVectorOf = 16 / int(sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

/// kWidth elements in words, accessed 8 or 16 bytes at a time. Types of 16 bits stay packed in pairs: element by
/// element the compiler would give each a register of its own.
template <class T, int kWidth>
struct Words {
  static constexpr int kCount = kWidth * int(sizeof(T)) / 4;
  static_assert(kCount == 2 || kCount % 4 == 0);
  uint32_t word[kCount];

  // By name of the vector types: a structure is now and then stored word by word.
  __device__ __forceinline__ static Words read(const T* from) {
    Words words;
    if constexpr (kCount == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      words.word[0] = v.x, words.word[1] = v.y;
    } else {
#pragma unroll
      for (int w = 0; w < kCount; w += 4) {
        const uint4 v = reinterpret_cast<const uint4*>(from)[w / 4];
        words.word[w] = v.x, words.word[w + 1] = v.y, words.word[w + 2] = v.z, words.word[w + 3] = v.w;
      }
    }
    return words;
  }
  __device__ __forceinline__ void write(T* to) const {
    if constexpr (kCount == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
    } else {
#pragma unroll
      for (int w = 0; w < kCount; w += 4)
        reinterpret_cast<uint4*>(to)[w / 4] = make_uint4(word[w], word[w + 1], word[w + 2], word[w + 3]);
    }
  }

  [[nodiscard]] __device__ __forceinline__ float value(int e) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(word[e]);
    } else {
      const uint32_t pair = word[e / 2];
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __uint_as_float(e % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
      } else {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(e % 2 == 0 ? pair & 0xffffu : pair >> 16)));
      }
    }
  }
  /// Of kWidth values from `values[first]` on.
  template <int kValues>
  __device__ __forceinline__ static Words of(const float (&values)[kValues], int first) {
    Words words;
#pragma unroll
    for (int w = 0; w < kCount; ++w) {
      if constexpr (sizeof(T) == 4) {
        words.word[w] = __float_as_uint(values[first + w]);
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[first + 2 * w], values[first + 2 * w + 1]);
        words.word[w] = reinterpret_cast<const uint32_t&>(pair);
      } else {
        const __half2 pair = __floats2half2_rn(values[first + 2 * w], values[first + 2 * w + 1]);
        words.word[w] = reinterpret_cast<const uint32_t&>(pair);
      }
    }
    return words;
  }
};

/// The part of a row of up to 32 kValues channels that a lane owns, as it is in memory.
template <class T, int kValues, int kWidth>
struct RawRow {
  static constexpr int kChunks = kValues / kWidth;
  Words<T, kWidth> chunk[kChunks];

  /// Vectors beyond the row are read from its start, without a branch; normalise() leaves them out.
  __device__ __forceinline__ void load(const T* row, int channels, int lane) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const int c = (j * kWarp + lane) * kWidth;
      chunk[j] = Words<T, kWidth>::read(row + (c < channels ? c : 0));
    }
  }
  __device__ __forceinline__ void store(T* row, int channels, int lane) const {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const int c = (j * kWarp + lane) * kWidth;
      if (c < channels) chunk[j].write(row + c);
    }
  }
  [[nodiscard]] __device__ __forceinline__ float value(int v) const {
    return chunk[v / kWidth].value(v % kWidth);
  }
};

template <class T, int kWidth, int kValues>
__device__ __forceinline__ void store_row(T* row, const float (&values)[kValues], int channels, int lane) {
#pragma unroll
  for (int j = 0; j < kValues / kWidth; ++j) {
    const int c = (j * kWarp + lane) * kWidth;
    if (c < channels) Words<T, kWidth>::of(values, j * kWidth).write(row + c);
  }
}

/// Before chunk `chunk` of a row: no reading far ahead in a long one, there are no registers for it.
template <int kValues>
__device__ __forceinline__ void pace(int chunk) {
  if (kValues > 48 && chunk % 2 == 0) asm volatile("" ::: "memory");
}

/// Brings a row of parameters to L2 before what it is needed with is there. By the first block alone: a line that many
/// ask for costs as often.
[[maybe_unused]] __device__ __forceinline__ void fetch_ahead(const float* parameters, int channels) {
  constexpr int kLine = 32;
  if (blockIdx.x > 0 || blockIdx.y > 0) return;
  for (int c = int(threadIdx.x) * kLine; c < channels; c += int(blockDim.x) * kLine)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(parameters + c));
}

/// Values of one lane in four interleaved sums: short chains of additions, always the same ones.
template <int kValues>
__device__ __forceinline__ float lane_sum(const float (&values)[kValues]) {
  float part[4] = {0, 0, 0, 0};
#pragma unroll
  for (int v = 0; v < kValues; ++v) part[v % 4] += values[v];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

template <int kValues>
__device__ __forceinline__ float lane_square_sum(const float (&values)[kValues]) {
  float part[4] = {0, 0, 0, 0};
#pragma unroll
  for (int v = 0; v < kValues; ++v) part[v % 4] = __fmaf_rn(values[v], values[v], part[v % 4]);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

/// x / y to half a unit in the last place or so, for y far from the ends of the range: the exact division is a call,
/// around which registers spill.
__device__ __forceinline__ float quotient(float x, float y) {
  const float inverse = __fdividef(1.0f, y), first = __fmul_rn(x, inverse);
  return __fmaf_rn(__fmaf_rn(-y, first, x), inverse, first);
}

/// (row - mean) / deviation, mean first and then squared deviations; vectors beyond the row stay out of both. Returns
/// 1 / deviation.
template <int kWidth, int kValues>
__device__ __forceinline__ float normalise(float (&row)[kValues], int channels, float eps, int lane) {
  if (channels < kValues * kWarp) {
#pragma unroll
    for (int v = 0; v < kValues; ++v)
      if ((v / kWidth * kWarp + lane) * kWidth >= channels) row[v] = 0;
  }
  const float mean = quotient(warp_sum(lane_sum(row)), float(channels));
#pragma unroll
  for (int v = 0; v < kValues; ++v) row[v] = __fsub_rn(row[v], mean);
  if (channels < kValues * kWarp) {
#pragma unroll
    for (int v = 0; v < kValues; ++v)
      if ((v / kWidth * kWarp + lane) * kWidth >= channels) row[v] = 0;
  }
  const float variance = quotient(warp_sum(lane_square_sum(row)), float(channels));
  const float inverse = rsqrtf(__fadd_rn(variance, eps));
#pragma unroll
  for (int v = 0; v < kValues; ++v) row[v] = __fmul_rn(row[v], inverse);
  return inverse;
}

/// y = normalised * weight + bias for kRows rows at once: the parameters are read once for all. Rows go to `y`,
/// `stride` elements apart. A caller short of rows gives one of them twice, 0 apart: a condition here makes ptxas split
/// stores.
template <class T, int kWidth, int kRows, int kValues>
__device__ __forceinline__ void store_affine(const float (&rows)[kRows][kValues], const float* weight,
                                             const float* bias, int channels, int lane, T* y, int64_t stride) {
#pragma unroll
  for (int j = 0; j < kValues / kWidth; ++j) {
    const int c = (j * kWarp + lane) * kWidth;
    if (c >= channels) break;
    pace<kValues>(j);
    float scale[kWidth], shift[kWidth], values[kWidth];
    load_floats<float, kWidth>(weight + c, scale);
    load_floats<float, kWidth>(bias + c, shift);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) values[e] = __fmaf_rn(rows[r][j * kWidth + e], scale[e], shift[e]);
      Words<T, kWidth>::of(values, 0).write(y + r * stride + c);
    }
  }
}

/// 2 sigmoid(x) - 1, exactly 0 at 0: where b is 0 the gate is none, bit for bit.
[[maybe_unused]] __device__ __forceinline__ float gate_of(float x) {
  return tanhf(__fmul_rn(0.5f, x));
}

/// How a row lies in a warp: values of a lane, and whether they are all of the row. Where they are, the number of
/// channels is a constant of the kernel, and the bounds and most of the addresses fold away.
template <int kValues_, bool kExact>
struct RowShape {
  static constexpr int kValues = kValues_;
  [[nodiscard]] __device__ __forceinline__ static int channels(int given) { return kExact ? kValues * kWarp : given; }
};

/// Calls f(RowShape) with the smallest shape that holds `channels`.
template <class F>
void with_row_shape(int channels, const F& f) {
  if (channels == 24 * kWarp) return f(RowShape<24, true>{});   // ViT-B
  if (channels == 32 * kWarp) return f(RowShape<32, true>{});   // ViT-L
  if (channels <= 8 * kWarp) return f(RowShape<8, false>{});    // ViT-Ti
  if (channels <= 16 * kWarp) return f(RowShape<16, false>{});  // ViT-S
  if (channels <= 32 * kWarp) return f(RowShape<32, false>{});
  if (channels <= 48 * kWarp) return f(RowShape<48, false>{});  // ViT-H, ViT-g
  return f(RowShape<kMaxChannels / kWarp, false>{});
}

/// Throws unless rows of `channels` can be read as vectors.
inline void check_channels(const char* who, int channels) {
  if (channels < 8 || channels > kMaxChannels || channels % 8 != 0)
    fail(ExitCode::usage, who, ": ", channels, " channels; expected a multiple of 8 from 8 to ", kMaxChannels);
}

/// Throws unless `pointer` is there and aligned to the widest access.
inline void check_pointer(const char* who, const char* name, const void* pointer) {
  if (!pointer) fail(ExitCode::usage, who, ": ", name, " is null");
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0)
    fail(ExitCode::usage, who, ": ", name, " is not aligned to 16 bytes");
}

inline void check_dtype(const char* who, DType dtype) {
  if (dtype != DType::fp32 && dtype != DType::bf16 && dtype != DType::fp16)
    fail(ExitCode::usage, who, ": unknown element type ", int(dtype));
}

}  // namespace
}  // namespace pyra::kernels::cuda
