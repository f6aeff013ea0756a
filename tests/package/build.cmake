# cmake -DSOURCES= -DFOLDER= -DLAUNCHER= -DFLAGS= -P build.cmake: builds plugin projects against the installed package:
# the two beside this file and two programs that embed the library, the one that docs/plugins.md makes from nothing, as it stands there, and what
# `pyractl plugins new` writes.

# take(LANGUAGE FILE): the page's first block in that language becomes a file.
file(READ ${SOURCES}/../../docs/plugins.md page)
function(take language file)
  string(REGEX MATCH "\n```${language}\n([^`]*)\n```\n" found "${page}")
  if(NOT found)
    message(FATAL_ERROR "docs/plugins.md has no ${language} block")
  endif()
  file(WRITE ${FOLDER}/from_docs/${file} "${CMAKE_MATCH_1}\n")
endfunction()
take(cmake CMakeLists.txt)
take(cpp attentive.cpp)

# A name that the sdk has too: what is written must build all the same.
foreach(kind merge peft)
  execute_process(COMMAND ${FOLDER}/prefix/bin/pyractl plugins new ${kind} schedule --out ${FOLDER}/new_${kind}
                  COMMAND_ERROR_IS_FATAL ANY)
endforeach()

foreach(source ${SOURCES}/example_merger ${SOURCES}/example_adapter ${SOURCES}/embed ${SOURCES}/headers
               ${FOLDER}/from_docs ${FOLDER}/new_merge ${FOLDER}/new_peft)
  get_filename_component(name ${source} NAME)
  execute_process(
    COMMAND ${CMAKE_COMMAND} -G Ninja -S ${source} -B ${FOLDER}/${name}/build -DCMAKE_BUILD_TYPE=Release
            -DCMAKE_PREFIX_PATH=${FOLDER}/prefix -DCMAKE_CXX_FLAGS=${FLAGS} "-DCMAKE_CXX_COMPILER_LAUNCHER=${LAUNCHER}"
    COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND ${CMAKE_COMMAND} --build ${FOLDER}/${name}/build -j 2 COMMAND_ERROR_IS_FATAL ANY)
endforeach()

# A project that can do without pyra is told that it is not there, and goes on.
file(WRITE ${FOLDER}/without/CMakeLists.txt "cmake_minimum_required(VERSION 3.25)
project(without LANGUAGES CXX)
find_package(pyra QUIET)
if(pyra_FOUND OR NOT pyra_NOT_FOUND_MESSAGE MATCHES \"LibTorch was not found\")
  message(FATAL_ERROR \"found: \${pyra_FOUND}, \${pyra_NOT_FOUND_MESSAGE}\")
endif()
")
execute_process(
  COMMAND ${CMAKE_COMMAND} -G Ninja -S ${FOLDER}/without -B ${FOLDER}/without/build -DCMAKE_PREFIX_PATH=${FOLDER}/prefix
          -DLIBTORCH=${FOLDER}/nowhere
  COMMAND_ERROR_IS_FATAL ANY)
