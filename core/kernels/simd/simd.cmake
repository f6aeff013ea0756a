# Micro-kernels for x86-64, each file with the instructions it may use; cpu_kernel.cpp asks the CPU before any runs.
# They include no ATen and no C++ library: an inline function compiled here for AVX-512 must never be the copy that the
# linker keeps for everybody.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  include(CheckCXXCompilerFlag)
  set(pyra_avx2 -mavx2 -mfma -O3 -fno-math-errno)
  set(pyra_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mbmi2 ${pyra_avx2}
      -Wno-uninitialized -Wno-maybe-uninitialized)  # GCC bug 105593: its own AVX-512 headers
  check_cxx_compiler_flag("-mavx512bf16" PYRA_HAS_AVX512_FLAGS)
  if(PYRA_HAS_AVX512_FLAGS)
    file(GLOB pyra_simd_callers CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*_simd.cpp)  # ordinary C++
    set(pyra_micro ${CMAKE_CURRENT_LIST_DIR}/micro)
    target_sources(pyra PRIVATE ${pyra_micro}_avx2.cpp ${pyra_micro}_avx512.cpp ${pyra_micro}_avx512_bf16.cpp
                                ${pyra_simd_callers})
    set_source_files_properties(${pyra_micro}_avx2.cpp PROPERTIES COMPILE_OPTIONS "${pyra_avx2}")
    set_source_files_properties(${pyra_micro}_avx512.cpp PROPERTIES COMPILE_OPTIONS "${pyra_avx512}")
    set_source_files_properties(${pyra_micro}_avx512_bf16.cpp PROPERTIES COMPILE_OPTIONS "${pyra_avx512};-mavx512bf16")
    set_source_files_properties(${pyra_micro}_avx2.cpp ${pyra_micro}_avx512.cpp ${pyra_micro}_avx512_bf16.cpp
                                PROPERTIES SKIP_PRECOMPILE_HEADERS ON)
    target_compile_definitions(pyra PRIVATE PYRA_SIMD_X86)
  endif()
endif()
