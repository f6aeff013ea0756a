# Compiler settings shared by every target of the project.
find_program(PYRA_CCACHE ccache)
if(PYRA_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # Precompiled headers need ccache to trust their time stamps and defines.
  set(CMAKE_CXX_COMPILER_LAUNCHER
      ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
      ${PYRA_CCACHE})
endif()

add_library(pyra_flags INTERFACE)
target_compile_options(pyra_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -fpch-preprocess>)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
  # GCC 12 and 13 see bounds violations in std::string that are not there (GCC bug 105329 and its kin).
  target_compile_options(pyra_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Wno-array-bounds -Wno-restrict -Wno-stringop-overflow -Wno-stringop-overread>)
endif()
if(PYRA_WERROR)
  target_compile_options(pyra_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(PYRA_SANITIZE)
  target_compile_options(pyra_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${PYRA_SANITIZE} -fno-omit-frame-pointer>)
  target_link_options(pyra_flags INTERFACE -fsanitize=${PYRA_SANITIZE})
endif()

find_package(nlohmann_json REQUIRED)
find_package(tomlplusplus REQUIRED)
find_package(Boost 1.81 REQUIRED)

# The CUDA part is a library of its own, made where nvcc is: nothing else links it, it is opened where a driver answers.
find_program(PYRA_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
mark_as_advanced(PYRA_NVCC)
set(_pyra_cuda_default OFF)
if(PYRA_NVCC AND NOT PYRA_SANITIZE)
  set(_pyra_cuda_default ON)
endif()
option(PYRA_CUDA "Build the CUDA engine (needs nvcc 12.4 or newer and cuBLASLt)" ${_pyra_cuda_default})
if(PYRA_CUDA)
  set(CMAKE_CUDA_COMPILER ${PYRA_NVCC})
  # Code for A100, RTX 30xx and H100/H200, and PTX that drivers compile for what is newer.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 90a-real 90-virtual)
  endif()
  if(PYRA_CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
    set(CMAKE_CUDA_COMPILER_LAUNCHER ${PYRA_CCACHE})
  endif()
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that newer compilers have it
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  find_package(CUDAToolkit REQUIRED COMPONENTS cudart_static cublasLt)
  message(STATUS "pyractl: CPU and CUDA (nvcc ${CMAKE_CUDA_COMPILER_VERSION})")
else()
  message(STATUS "pyractl: CPU only (no nvcc on this machine)")
endif()
