# libpyra_cuda.so: kernels and the engine on a GPU. Only cuda_library.cpp opens it, and only where a driver answers.
file(GLOB pyra_cuda_sources CONFIGURE_DEPENDS
     ${CMAKE_CURRENT_SOURCE_DIR}/kernels/cuda/*.cu ${CMAKE_CURRENT_SOURCE_DIR}/kernels/cuda/*.cpp
     ${CMAKE_CURRENT_SOURCE_DIR}/engine/cuda/*.cpp)
add_library(pyra_cuda SHARED ${pyra_cuda_sources})
set(pyra_together ${pyra_cuda_sources})
list(FILTER pyra_together INCLUDE REGEX "/engine/cuda/")
pyra_unity(pyra_cuda ${pyra_together})
target_link_libraries(pyra_cuda PRIVATE pyra pyra_flags CUDA::cudart_static CUDA::cublasLt)
target_compile_features(pyra_cuda PRIVATE cxx_std_20)
target_compile_definitions(pyra_cuda PRIVATE PYRA_VERSION="${PROJECT_VERSION}")
target_compile_options(pyra_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
# cuBLASLt: the toolkit's, else the one of LibTorch's wheels.
set_target_properties(pyra_cuda PROPERTIES
  INSTALL_RPATH "${PYRA_LIB_RPATH};${CUDAToolkit_LIBRARY_DIR};${PYRA_LIBTORCH_ROOT}/../nvidia/cu13/lib")
install(TARGETS pyra_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
