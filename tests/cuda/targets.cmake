# Kernels are tested as the engine calls them, without the way through the graph.
target_link_libraries(test_cuda PRIVATE pyra_cuda CUDA::cudart_static CUDA::cublasLt)
