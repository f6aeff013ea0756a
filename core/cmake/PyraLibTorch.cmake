# pyra::libtorch: LibTorch's CPU libraries and headers, linked by name.
#
# LibTorch's own CMake config insists on a CUDA toolkit when the wheel was built
# with CUDA, even to link its CPU library. So it is not used: the headers and
# libtorch_cpu + libc10 are all that the CPU part needs.
#
# Looked for in: -DLIBTORCH= or $LIBTORCH (the folder with include/ and lib/),
# CMAKE_PREFIX_PATH (that folder, or its share/cmake), where it was found last time, PYRA_LIBTORCH_DEFAULT.
# Not found: PYRA_LIBTORCH_PROBLEM says so, else it is empty; who asked decides whether that is an error.
set(PYRA_LIBTORCH_PROBLEM "")
if(NOT LIBTORCH AND DEFINED ENV{LIBTORCH})
  set(LIBTORCH "$ENV{LIBTORCH}")
endif()
string(REPLACE ":" ";" _pyra_prefixes "$ENV{CMAKE_PREFIX_PATH}")
set(_pyra_libtorch_found "")
set(_pyra_tried "")
if(LIBTORCH)
  list(APPEND _pyra_tried ${LIBTORCH})
else()
  foreach(folder IN LISTS CMAKE_PREFIX_PATH _pyra_prefixes)
    list(APPEND _pyra_tried ${folder} ${folder}/../..)
  endforeach()
  list(APPEND _pyra_tried ${PYRA_LIBTORCH_ROOT} ${PYRA_LIBTORCH_DEFAULT})
endif()
foreach(folder IN LISTS _pyra_tried)
  if(EXISTS ${folder}/include/ATen/ATen.h AND EXISTS ${folder}/lib/libtorch_cpu.so)
    get_filename_component(_pyra_libtorch_found ${folder} ABSOLUTE)
    break()
  endif()
endforeach()
if(NOT _pyra_libtorch_found)
  list(JOIN _pyra_tried "\n  " _pyra_tried)
  string(CONCAT PYRA_LIBTORCH_PROBLEM
    "LibTorch was not found in\n  ${_pyra_tried}\n"
    "Run 'make setup' in pyractl's sources (it installs the wheel torch==2.11.0 into .deps), "
    "or name an existing one with LIBTORCH=/path/to/torch (the folder with include/ and lib/).")
  return()
endif()
set(PYRA_LIBTORCH_ROOT ${_pyra_libtorch_found} CACHE PATH "LibTorch: the folder that holds include/ and lib/" FORCE)

file(STRINGS ${PYRA_LIBTORCH_ROOT}/include/torch/headeronly/version.h _pyra_torch_version
     REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE "[^0-9;]" "" _pyra_torch_version "${_pyra_torch_version}")
list(JOIN _pyra_torch_version "." PYRA_LIBTORCH_VERSION)

if(NOT TARGET pyra::libtorch)
  add_library(pyra::libtorch INTERFACE IMPORTED GLOBAL)
  target_include_directories(pyra::libtorch SYSTEM INTERFACE
    ${PYRA_LIBTORCH_ROOT}/include ${PYRA_LIBTORCH_ROOT}/include/torch/csrc/api/include)
  target_link_libraries(pyra::libtorch INTERFACE
    ${PYRA_LIBTORCH_ROOT}/lib/libtorch_cpu.so ${PYRA_LIBTORCH_ROOT}/lib/libc10.so)
  # One OpenMP runtime in the process, LibTorch's: at::parallel_for is a template and opens regions in our code.
  target_compile_options(pyra::libtorch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
  if(EXISTS ${PYRA_LIBTORCH_ROOT}/lib/libgomp.so.1)
    target_link_libraries(pyra::libtorch INTERFACE ${PYRA_LIBTORCH_ROOT}/lib/libgomp.so.1)
  else()
    target_link_libraries(pyra::libtorch INTERFACE gomp)
  endif()
  # libtorch_cpu names cudart and cupti, which stand in sibling wheels found by its own RPATH.
  target_link_options(pyra::libtorch INTERFACE -Wl,--allow-shlib-undefined)
endif()
