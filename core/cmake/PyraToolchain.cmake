# Compiler settings shared by every target of the project.
find_program(PYRA_CCACHE ccache)
if(PYRA_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # Precompiled headers need ccache to trust their time stamps and defines.
  set(CMAKE_CXX_COMPILER_LAUNCHER
      ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
      ${PYRA_CCACHE})
endif()

add_library(pyra_flags INTERFACE)
target_compile_options(pyra_flags INTERFACE -Wall -Wextra -fpch-preprocess)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
  # GCC 12 and 13 see bounds violations in std::string that are not there (GCC bug 105329 and its kin).
  target_compile_options(pyra_flags INTERFACE -Wno-array-bounds -Wno-restrict -Wno-stringop-overflow -Wno-stringop-overread)
endif()
if(PYRA_WERROR)
  target_compile_options(pyra_flags INTERFACE -Werror)
endif()
if(PYRA_SANITIZE)
  target_compile_options(pyra_flags INTERFACE -fsanitize=${PYRA_SANITIZE} -fno-omit-frame-pointer)
  target_link_options(pyra_flags INTERFACE -fsanitize=${PYRA_SANITIZE})
endif()

find_package(nlohmann_json REQUIRED)
find_package(tomlplusplus REQUIRED)
find_package(Boost 1.81 REQUIRED)

find_program(PYRA_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
mark_as_advanced(PYRA_NVCC)
if(PYRA_NVCC)
  message(STATUS "pyractl: CPU only. nvcc is at ${PYRA_NVCC}, but this version has no CUDA part yet")
else()
  message(STATUS "pyractl: CPU only (no nvcc on this machine)")
endif()
