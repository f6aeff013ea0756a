# Kernels are tested as the engine calls them, without the way through the graph.
target_link_libraries(test_cuda PRIVATE pyra_cuda CUDA::cudart_static CUDA::cublasLt)
# driver_calls.h; a toolkit may come without CUPTI.
if(TARGET CUDA::cupti)
  target_link_libraries(test_cuda PRIVATE CUDA::cupti)
else()
  set_source_files_properties(cuda/driver_calls_test.cpp PROPERTIES HEADER_FILE_ONLY TRUE)
endif()
