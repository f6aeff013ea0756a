# Micro-kernels for x86-64, each file with the instructions it may use; cpu_kernel.cpp asks the CPU before any runs.
# They include no ATen and no C++ library: an inline function compiled here for AVX-512 must never be the copy that the
# linker keeps for everybody.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  include(CheckCXXCompilerFlag)
  set(pyra_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mbmi2 -O3 -fno-math-errno
      -Wno-uninitialized -Wno-maybe-uninitialized)  # GCC bug 105593: its own AVX-512 headers
  check_cxx_compiler_flag("-mavx512bf16" PYRA_HAS_AVX512_FLAGS)
  if(PYRA_HAS_AVX512_FLAGS)
    file(GLOB pyra_simd CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*_avx512.cpp)
    file(GLOB pyra_simd_bf16 CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*_avx512_bf16.cpp)
    file(GLOB pyra_simd_callers CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*_simd.cpp)  # ordinary C++
    target_sources(pyra PRIVATE ${pyra_simd} ${pyra_simd_bf16} ${pyra_simd_callers})
    set_source_files_properties(${pyra_simd} ${pyra_simd_bf16} PROPERTIES SKIP_PRECOMPILE_HEADERS ON)
    set_source_files_properties(${pyra_simd} PROPERTIES COMPILE_OPTIONS "${pyra_avx512}")
    set_source_files_properties(${pyra_simd_bf16} PROPERTIES COMPILE_OPTIONS "${pyra_avx512};-mavx512bf16")
    target_compile_definitions(pyra PRIVATE PYRA_SIMD_X86)
  endif()
endif()
