#include "engine/cuda/graph.h"

#include "kernels/cuda/cuda_call.h"

namespace pyra::engine {

Graph::Graph(cudaStream_t stream, const std::function<void()>& enqueue) {
  cudaGraph_t graph = nullptr;
  PYRA_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  try {
    enqueue();
  } catch (...) {
    (void)cudaStreamEndCapture(stream, &graph);
    if (graph) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError();
    throw;
  }
  PYRA_CUDA(cudaStreamEndCapture(stream, &graph));
  const cudaError_t status = cudaGraphInstantiate(&executable_, graph, 0);
  (void)cudaGraphDestroy(graph);
  PYRA_CUDA(status);
  PYRA_CUDA(cudaGraphUpload(executable_, stream));
}

Graph::~Graph() {
  if (executable_) (void)cudaGraphExecDestroy(executable_);
}

void Graph::launch(cudaStream_t stream) const {
  PYRA_CUDA(cudaGraphLaunch(executable_, stream));
}

}  // namespace pyra::engine
