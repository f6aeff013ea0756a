# Several files of a room compiled as one: what headers and templates cost is paid once a group.
option(PYRA_UNITY "Compile the files of a room in groups: half the time of a whole build" ON)

# pyra_unity(TARGET FILES…): by folder, at most PYRA_UNITY_FILES in a group, so that two compilers fit into 4 GB. Files
# with flags of their own are left out by CMake.
set(PYRA_UNITY_FILES 8)
function(pyra_unity target)
  if(NOT PYRA_UNITY)
    return()
  endif()
  set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
  foreach(file IN LISTS ARGN)
    cmake_path(GET file PARENT_PATH folder)
    cmake_path(GET folder FILENAME room)
    if(NOT DEFINED count_${room})
      set(count_${room} 0)
    endif()
    math(EXPR group "${count_${room}} / ${PYRA_UNITY_FILES}")
    math(EXPR count_${room} "${count_${room}} + 1")
    set_source_files_properties(${file} PROPERTIES UNITY_GROUP ${room}_${group})
  endforeach()
endfunction()
