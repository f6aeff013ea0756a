# The commit this is built from, for the context of benchmarks; "unknown" outside a checkout.
set(pyra_commit unknown)
find_package(Git QUIET)
if(Git_FOUND AND EXISTS ${PROJECT_SOURCE_DIR}/.git)
  execute_process(COMMAND ${GIT_EXECUTABLE} rev-parse --short=12 HEAD WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
    OUTPUT_VARIABLE commit ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE commit_failed)
  execute_process(COMMAND ${GIT_EXECUTABLE} rev-parse --git-path logs/HEAD WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
    OUTPUT_VARIABLE commit_log ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE log_failed)
  if(NOT commit_failed)
    set(pyra_commit ${commit})
  endif()
  cmake_path(ABSOLUTE_PATH commit_log BASE_DIRECTORY ${PROJECT_SOURCE_DIR})
  if(NOT log_failed AND EXISTS ${commit_log})
    # Written at every commit and checkout: configuring again then keeps the name true.
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${commit_log})
  endif()
endif()
set_source_files_properties(${CMAKE_CURRENT_SOURCE_DIR}/tasks/bench_machine.cpp
  PROPERTIES COMPILE_DEFINITIONS PYRA_COMMIT="${pyra_commit}")
