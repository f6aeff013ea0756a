// A CUDA graph: what a function sends to a stream, captured once, to be launched whole.
#pragma once
#include <cuda_runtime_api.h>

#include <functional>
#include <utility>

namespace pyra::engine {

class Graph {
 public:
  /// None.
  Graph() = default;
  /// Captures; nothing runs yet. Throws what `enqueue` throws, and the stream is then as it was.
  Graph(cudaStream_t stream, const std::function<void()>& enqueue);
  ~Graph();
  Graph(Graph&& other) noexcept : executable_(std::exchange(other.executable_, nullptr)) {}
  Graph& operator=(Graph&& other) noexcept {
    std::swap(executable_, other.executable_);
    return *this;
  }

  [[nodiscard]] explicit operator bool() const { return executable_ != nullptr; }
  void launch(cudaStream_t stream) const;

 private:
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace pyra::engine
