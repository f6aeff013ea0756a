# cmake -DBUILD= -DFOLDER= -P install.cmake: installs the package and moves it: what it finds, it finds relative to itself.
file(REMOVE_RECURSE ${FOLDER})
execute_process(COMMAND ${CMAKE_COMMAND} --install ${BUILD} --prefix ${FOLDER}/staging
                OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
file(RENAME ${FOLDER}/staging ${FOLDER}/prefix)
