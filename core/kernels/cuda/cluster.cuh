// Blocks that share an image or a sum as a cluster: their barrier, each other's shared memory, and how many they may
// be. On devices without clusters, and where one block has the image to itself, a cluster is one block.
#pragma once
#include "kernels/cuda/dependent.cuh"

namespace pyra::kernels::cuda {
namespace {

constexpr int kMostClustered = 8;  // blocks of a cluster that every device with clusters can schedule

/// All threads of the cluster; of the block where a cluster is one block. Orders accesses to shared memory, remote too.
[[maybe_unused]] __device__ __forceinline__ void barrier(int cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster > 1) {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
    return;
  }
#endif
  __syncthreads();
}

/// A cluster's barrier in two parts; nothing where a cluster is one block.
[[maybe_unused]] __device__ __forceinline__ void arrive(int cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster > 1) __cluster_barrier_arrive();
#endif
}
[[maybe_unused]] __device__ __forceinline__ void await_arrivals(int cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster > 1) __cluster_barrier_wait();
#endif
}

/// The same variable in the shared memory of block `rank` of this cluster.
template <class T>
__device__ __forceinline__ T* of_block(T* shared, int rank, int cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster > 1) return static_cast<T*>(__cluster_map_shared_rank(shared, unsigned(rank)));
#endif
  return shared;
}

struct Device {
  int processors = 0;
  bool has_clusters = false;  ///< and the kernel was compiled for them
};

template <auto kKernel>
Device device_for() {
  return {multiprocessors(), has_sm90_code<kKernel>()};
}

/// The most blocks a cluster may have so that all clusters run at once and each block has `least` of `work`.
inline int cluster_size(const Device& device, int64_t clusters, int work, int least) {
  int size = 1;
  while (device.has_clusters && size < kMostClustered && clusters * size * 2 <= device.processors &&
         work >= least * size * 2) {
    size *= 2;
  }
  return size;
}

}  // namespace
}  // namespace pyra::kernels::cuda
