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

foreach(kind merge peft)
  execute_process(COMMAND ${FOLDER}/prefix/bin/pyractl plugins new ${kind} fresh --out ${FOLDER}/new_${kind}
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
