// Instructions of sm_90a: tensors copied by the copy engine, and matrices multiplied by a warpgroup.
#pragma once
#include <type_traits>

#include "kernels/cuda/device.cuh"

namespace pyra::kernels::cuda {
namespace {

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return uint32_t(__cvta_generic_to_shared(at));
}

/// A barrier that one arrival and the bytes it announces complete; its phases count from 0.
__device__ __forceinline__ void start_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
/// Makes started barriers known to the copy engine.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void await_phase(uint64_t* barrier, int phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(phase & 1)
      : "memory");
}

/// Makes this thread's stores to shared memory known to the copy engine and to wgmma, once threads have met.
__device__ __forceinline__ void publish_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Makes what this thread has been told of known to the copy engine, in global memory.
__device__ __forceinline__ void publish_memory() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

/// A warp's 16x16 block, as mma.sync's left operand has it, to columns 16 * `block` and on of its 16 rows. These start
/// at `rows`, 128 bytes each, swizzled as describe() wants them; rows before them to the next 1024 bytes: a multiple of
/// 8.
__device__ __forceinline__ void store_block(unsigned char* rows, int block, const uint32_t (&word)[4]) {
  const int matrix = threadIdx.x % 32 / 8, row = threadIdx.x % 8;  // matrices: rows 0 to 7, 8 to 15, then 8 columns on
  const uint32_t at = shared_address(rows) + (8 * (matrix % 2) + row) * 128 + ((2 * block + matrix / 2) ^ row) * 16;
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(word[0]), "r"(word[1]),
               "r"(word[2]), "r"(word[3])
               : "memory");
}

/// Has the copy engine read a tensor's map, a kernel's parameter, before it is needed.
[[maybe_unused]] __device__ __forceinline__ void fetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// The box of a tensor [image, row, channel] at these coordinates to shared memory; zeros where the tensor has ended.
__device__ __forceinline__ void copy_box(void* to, const void* map, int channel, int row, int image,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(shared_address(to)),
      "l"(map), "r"(channel), "r"(row), "r"(image), "r"(shared_address(barrier))
      : "memory");
}

/// What wgmma is told of rows of 128 bytes at a multiple of 1024, their 16-byte units swizzled: 8 rows are 1024 bytes,
/// both along the rows (q and k, whose 64 channels are the inner dimension) and across them (v, whose rows are).
__device__ __forceinline__ uint64_t describe(const void* rows) {
  constexpr uint64_t kSwizzled128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32, kUnused = 1 << 16;
  return kSwizzled128 | kEightRows | kUnused | ((shared_address(rows) & 0x3ffff) >> 4);
}

/// Between a warpgroup's own writes of registers and the multiplications that use them.
__device__ __forceinline__ void open_multiplications() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
/// Closes the multiplications issued so far and waits for them.
__device__ __forceinline__ void await_multiplications() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}
/// Closes the multiplications issued so far: they become a group.
__device__ __forceinline__ void close_multiplications() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Until at most the `Pending` youngest closed groups still run.
template <int Pending>
__device__ __forceinline__ void await_all_but() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
/// Keeps the compiler from reading results before the wait that is written above this.
template <int N>
__device__ __forceinline__ void hold_back(float (&results)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(results[i])::"memory");
}

// clang-format off
#define PYRA_C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define PYRA_C8(i) PYRA_C4(i), PYRA_C4(i + 4)
#define PYRA_C16(i) PYRA_C8(i), PYRA_C8(i + 8)
#define PYRA_C32(i) PYRA_C16(i), PYRA_C16(i + 16)
#define PYRA_REGS4 "%0, %1, %2, %3"
#define PYRA_REGS8 PYRA_REGS4 ",%4, %5, %6, %7"
#define PYRA_REGS12 PYRA_REGS8 ",%8, %9, %10, %11"
#define PYRA_REGS16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PYRA_REGS20 PYRA_REGS16 ",%16, %17, %18, %19"
#define PYRA_REGS24 PYRA_REGS16 ",%16, %17, %18, %19, %20, %21, %22, %23"
#define PYRA_REGS32 PYRA_REGS24 ",%24, %25, %26, %27, %28, %29, %30, %31"
#define PYRA_REGS40 PYRA_REGS32 ",%32, %33, %34, %35, %36, %37, %38, %39"
#define PYRA_REGS48 PYRA_REGS40 ",%40, %41, %42, %43, %44, %45, %46, %47"
#define PYRA_REGS52 PYRA_REGS48 ",%48, %49, %50, %51"
#define PYRA_REGS64 PYRA_REGS52 ",%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PYRA_SS(n, type, registers, a_at, b_at, add_at, ...)                                                      \
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %" #add_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n         \
               "k16.f32." type "." type " {" registers "}, %" #a_at ", %" #b_at ", more, 1, 1, 0, 0;\n}"              \
               : __VA_ARGS__ : "l"(a), "l"(b), "r"(int(add)))
#define PYRA_SS_OF(n, registers, a_at, b_at, add_at, ...)                                                         \
  if constexpr (std::is_same_v<T, __half>) PYRA_SS(n, "f16", registers, a_at, b_at, add_at, __VA_ARGS__);         \
  else PYRA_SS(n, "bf16", registers, a_at, b_at, add_at, __VA_ARGS__)
#define PYRA_RS(type)                                                                                             \
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." type   \
               "." type " {" PYRA_REGS32 "}, {%32, %33, %34, %35}, %36, more, 1, 1, 1;\n}"                            \
               : PYRA_C32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)))
#define PYRA_SHARED(type)                                                                                         \
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." type   \
               "." type " {" PYRA_REGS32 "}, %32, %33, more, 1, 1, %35, 1;\n}"                                       \
               : PYRA_C32(0) : "l"(a), "l"(b), "r"(int(add)), "n"(int(Transposed)))
// clang-format on

/// c [64, N] = a [64, 16] bᵀ [N, 16], plus what c was if `add`. Warp w of the warpgroup has rows 16w to 16w+15, as
/// mma.sync's m16n8 tiles side by side.
template <class T, int N>
__device__ __forceinline__ void multiply_transposed(float (&c)[N / 2], uint64_t a, uint64_t b, bool add) {
  if constexpr (N == 8) {
    PYRA_SS_OF(8, PYRA_REGS4, 4, 5, 6, PYRA_C4(0));
  } else if constexpr (N == 16) {
    PYRA_SS_OF(16, PYRA_REGS8, 8, 9, 10, PYRA_C8(0));
  } else if constexpr (N == 24) {
    PYRA_SS_OF(24, PYRA_REGS12, 12, 13, 14, PYRA_C8(0), PYRA_C4(8));
  } else if constexpr (N == 40) {
    PYRA_SS_OF(40, PYRA_REGS20, 20, 21, 22, PYRA_C16(0), PYRA_C4(16));
  } else if constexpr (N == 32) {
    PYRA_SS_OF(32, PYRA_REGS16, 16, 17, 18, PYRA_C16(0));
  } else if constexpr (N == 48) {
    PYRA_SS_OF(48, PYRA_REGS24, 24, 25, 26, PYRA_C16(0), PYRA_C8(16));
  } else if constexpr (N == 64) {
    PYRA_SS_OF(64, PYRA_REGS32, 32, 33, 34, PYRA_C32(0));
  } else if constexpr (N == 80) {
    PYRA_SS_OF(80, PYRA_REGS40, 40, 41, 42, PYRA_C32(0), PYRA_C8(32));
  } else if constexpr (N == 96) {
    PYRA_SS_OF(96, PYRA_REGS48, 48, 49, 50, PYRA_C32(0), PYRA_C16(32));
  } else if constexpr (N == 104) {
    PYRA_SS_OF(104, PYRA_REGS52, 52, 53, 54, PYRA_C32(0), PYRA_C16(32), PYRA_C4(48));
  } else {
    static_assert(N == 128);
    PYRA_SS_OF(128, PYRA_REGS64, 64, 65, 66, PYRA_C32(0), PYRA_C32(32));
  }
}

/// c [64, 64] = a [64, 16] b [16, 64], plus what c was if `add`; a as mma.sync's m16k16 tiles have it.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __half>)
    PYRA_RS("f16");
  else
    PYRA_RS("bf16");
}

/// c [64, 64] = a [64, 16] b [16, 64], plus what c was if `add`; a's rows lie in memory, or, if it is `Transposed`, its
/// columns do.
template <class T, bool Transposed>
__device__ __forceinline__ void multiply_shared(float (&c)[32], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __half>)
    PYRA_SHARED("f16");
  else
    PYRA_SHARED("bf16");
}

#undef PYRA_C4
#undef PYRA_C8
#undef PYRA_C16
#undef PYRA_C32
#undef PYRA_REGS4
#undef PYRA_REGS8
#undef PYRA_REGS12
#undef PYRA_REGS16
#undef PYRA_REGS20
#undef PYRA_REGS24
#undef PYRA_REGS32
#undef PYRA_REGS40
#undef PYRA_REGS48
#undef PYRA_REGS52
#undef PYRA_REGS64
#undef PYRA_SS
#undef PYRA_SS_OF
#undef PYRA_RS
#undef PYRA_SHARED

}  // namespace
}  // namespace pyra::kernels::cuda
