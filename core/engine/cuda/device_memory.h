// Memory on the device and pinned memory of the host, freed with its owner.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

#include "kernels/cuda/cuda_call.h"

namespace pyra::engine {

namespace detail {

struct DeviceSpace {
  static cudaError_t allocate(void** p, size_t bytes) { return cudaMalloc(p, bytes); }
  static void release(void* p) { (void)cudaFree(p); }
};
struct PinnedSpace {
  static cudaError_t allocate(void** p, size_t bytes) { return cudaMallocHost(p, bytes); }
  static void release(void* p) { (void)cudaFreeHost(p); }
};

}  // namespace detail

/// `bytes` of one space, at least 256-byte aligned, uninitialised. Empty by default.
template <class Space>
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) : bytes_(bytes) {
    if (bytes > 0) PYRA_CUDA(Space::allocate(&data_, bytes));
  }
  ~Memory() { Space::release(data_); }
  Memory(Memory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  template <class T = void>
  [[nodiscard]] T* get() const {
    return static_cast<T*>(data_);
  }
  [[nodiscard]] size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

using DeviceMemory = Memory<detail::DeviceSpace>;
using PinnedMemory = Memory<detail::PinnedSpace>;

/// A buffer's place in a DeviceMemory that others share, which must outlive it.
class DeviceSpan {
 public:
  DeviceSpan() = default;
  explicit DeviceSpan(char* at) : at_(at) {}

  template <class T = void>
  [[nodiscard]] T* get() const {
    return reinterpret_cast<T*>(at_);
  }

 private:
  char* at_ = nullptr;
};

}  // namespace pyra::engine
