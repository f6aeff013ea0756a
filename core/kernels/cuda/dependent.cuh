// Launches that overlap the kernel before them (programmatic dependent launch, from sm_90 on).
//
// A kernel so launched may start when every block of its predecessor has said admit_next() or ended. Until
// await_earlier() it may read what no kernel of the pass writes, weights above all, and must write nothing that another
// reads. await_earlier() returns when the predecessor has ended and its writes are seen; as that one waited likewise,
// all before it have ended too. So in every launch at least one thread of a kernel must wait, if not for a tally
// (below) that says as much, and a thread that touches activations must, and must not read them by __ldg or through
// __restrict__: that says they are read-only as long as the kernel lives, and it lives already while they are written.
// A pass begins with a kernel that is launched plainly (extract_patches) or with a graph, so what the pass before it
// changed, parameters included, is there for all.
//
// A kernel that says admit_next() only after await_earlier() vouches for what it waited for: the kernel behind it may
// read that without waiting, and so runs beside it. What such neighbours write is waited for by tallies: attention,
// matching and the projection of few images are so all under way at once, in one stream (Forward::attend_and_match).
// A tally's blocks have all started before the kernel that waits for it can, so they will end; and whoever has waited
// for the tallies and for the kernel in front of it has waited for all.
#pragma once
#include "kernels/cuda/device.cuh"

namespace pyra::kernels::cuda {
namespace {

__device__ __forceinline__ void await_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// By every thread or by one of each block.
__device__ __forceinline__ void admit_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// By all threads of a block that have written what others wait for: one more in the tally. Null: none waits.
[[maybe_unused]] __device__ __forceinline__ void report_block([[maybe_unused]] int* count) {
#if __CUDA_ARCH__ >= 900
  if (count == nullptr) return;
  __syncthreads();
  if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(count) : "memory");
#endif
}

/// By one thread, or by one of each warp before a __syncwarp(). Where blocks report nothing, launches do not overlap.
[[maybe_unused]] __device__ __forceinline__ void await_tally([[maybe_unused]] const Tally& tally) {
#if __CUDA_ARCH__ >= 900
  for (int count = 0; count < tally.whole;)
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(tally.count) : "memory");
#endif
}

/// Whether the current device runs the kernel's code for sm_90 or newer, in which await_earlier() waits and blocks may
/// form clusters. Asked once for each kernel.
template <auto kKernel>
bool has_sm90_code() {
  static std::atomic<int> known[64];
  return asked_once(known, [](int device) {
           int major = 0;
           cudaFuncAttributes attributes{};
           PYRA_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
           PYRA_CUDA(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel)));
           return major >= 9 && attributes.ptxVersion >= 90 ? 1 : -1;
         }) > 0;
}

struct LaunchShape {
  dim3 grid;
  int threads = 0;
  size_t shared = 0;  ///< bytes, dynamic
  int cluster = 1;    ///< blocks, along x
};

/// Launches a kernel that calls await_earlier(), beside the end of its predecessor in the stream where the device can.
template <auto kKernel, class... Arguments>
void launch_dependent(const LaunchShape& shape, cudaStream_t stream, const Arguments&... arguments) {
  if (shape.shared > kSharedAlways) allow_shared_memory<kKernel>();
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  config.attrs = attributes;
  if (has_sm90_code<kKernel>()) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(shape.cluster), 1, 1};
  }
  PYRA_CUDA(cudaLaunchKernelEx(&config, kKernel, arguments...));
}

}  // namespace
}  // namespace pyra::kernels::cuda
