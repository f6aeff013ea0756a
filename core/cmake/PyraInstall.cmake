# The installed package: bin/, lib/, lib/pyra/plugins/, include/pyra/<room>/*.h, lib/cmake/pyra/.
#
# It can be moved as a folder. Our own libraries find one another through $ORIGIN; LibTorch is looked for in
# <prefix>/lib/pyra/libtorch, which `cmake --install build --component libtorch` fills with a copy (0.5 GB),
# and then where it was when this was built: by a relative path if that lies under the prefix, else the absolute one.
include(CMakePackageConfigHelpers)

set(PYRA_LIBTORCH_COPY ${CMAKE_INSTALL_LIBDIR}/pyra/libtorch)  # with torch/ and nvidia/ in it, as in site-packages
set(PYRA_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/pyra)

cmake_path(IS_PREFIX CMAKE_INSTALL_PREFIX ${PYRA_LIBTORCH_ROOT} NORMALIZE _pyra_under_prefix)
if(_pyra_under_prefix)
  cmake_path(RELATIVE_PATH PYRA_LIBTORCH_ROOT BASE_DIRECTORY ${CMAKE_INSTALL_PREFIX} OUTPUT_VARIABLE _pyra_relative)
  set(_pyra_from_bin "$ORIGIN/../${_pyra_relative}/lib")
  set(_pyra_from_lib "${_pyra_from_bin}")
else()
  set(_pyra_from_bin ${PYRA_LIBTORCH_ROOT}/lib)
  set(_pyra_from_lib ${PYRA_LIBTORCH_ROOT}/lib)
endif()
set(PYRA_BIN_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR};$ORIGIN/../${PYRA_LIBTORCH_COPY}/torch/lib;${_pyra_from_bin}")
set(PYRA_LIB_RPATH "$ORIGIN;$ORIGIN/pyra/libtorch/torch/lib;${_pyra_from_lib}")

# The library with its headers, a folder a room, and all that find_package(pyra) reads.
function(pyra_install_library target)
  set_target_properties(${target} PROPERTIES INSTALL_RPATH "${PYRA_LIB_RPATH}")
  install(TARGETS ${target} EXPORT pyraTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  file(GLOB headers CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/*/*.h)
  foreach(header IN LISTS headers)
    get_filename_component(room ${header} DIRECTORY)
    install(FILES ${header} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/pyra/${room})
  endforeach()

  set(config ${PROJECT_BINARY_DIR}/cmake)
  configure_package_config_file(${PROJECT_SOURCE_DIR}/core/cmake/pyraConfig.cmake.in ${config}/pyraConfig.cmake
    INSTALL_DESTINATION ${PYRA_CMAKE_DIR} NO_SET_AND_CHECK_MACRO NO_CHECK_REQUIRED_COMPONENTS_MACRO)
  write_basic_package_version_file(${config}/pyraConfigVersion.cmake COMPATIBILITY SameMinorVersion)
  install(EXPORT pyraTargets NAMESPACE pyra:: DESTINATION ${PYRA_CMAKE_DIR})
  install(FILES ${config}/pyraConfig.cmake ${config}/pyraConfigVersion.cmake
                ${PROJECT_SOURCE_DIR}/core/cmake/PyraLibTorch.cmake ${PROJECT_SOURCE_DIR}/core/cmake/PyraPlugin.cmake
          DESTINATION ${PYRA_CMAKE_DIR})
  install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/licenses/pyra)
endfunction()

# A copy of LibTorch, for a prefix that is to run on its own.
set(_pyra_site ${PYRA_LIBTORCH_ROOT}/..)
install(DIRECTORY ${PYRA_LIBTORCH_ROOT}/include DESTINATION ${PYRA_LIBTORCH_COPY}/torch
        COMPONENT libtorch EXCLUDE_FROM_ALL)
foreach(library libtorch_cpu.so libc10.so libgomp.so.1)
  install(FILES ${PYRA_LIBTORCH_ROOT}/lib/${library} DESTINATION ${PYRA_LIBTORCH_COPY}/torch/lib
          COMPONENT libtorch EXCLUDE_FROM_ALL OPTIONAL)
endforeach()
install(FILES ${_pyra_site}/nvidia/cu13/lib/libcudart.so.13 ${_pyra_site}/nvidia/cu13/lib/libcupti.so.13
        DESTINATION ${PYRA_LIBTORCH_COPY}/nvidia/cu13/lib COMPONENT libtorch EXCLUDE_FROM_ALL OPTIONAL)
file(GLOB _pyra_notices ${_pyra_site}/torch-[0-9]*.dist-info ${_pyra_site}/nvidia_cuda_runtime-*.dist-info
     ${_pyra_site}/nvidia_cuda_cupti-*.dist-info)
if(_pyra_notices)
  install(DIRECTORY ${_pyra_notices} DESTINATION ${PYRA_LIBTORCH_COPY} COMPONENT libtorch EXCLUDE_FROM_ALL
          FILES_MATCHING REGEX "/(METADATA|licenses/.*)$")
endif()
