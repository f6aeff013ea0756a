# Shared objects that are no good plugins, really built. misbehaving.so takes its manners from the name it is copied
# to, so that one compilation serves every case.
set(bad_plugin_folder ${CMAKE_BINARY_DIR}/tests/bad_plugins)
add_library(misbehaving MODULE ${folder}/bad_plugins/misbehaving.cpp)
target_link_libraries(misbehaving PRIVATE pyra::pyra pyra_flags ${CMAKE_DL_LIBS})
add_library(no_symbol MODULE ${folder}/bad_plugins/no_symbol.cpp)
add_library(unresolved MODULE ${folder}/bad_plugins/unresolved.cpp)
set_target_properties(misbehaving no_symbol unresolved PROPERTIES
  PREFIX "" CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON LIBRARY_OUTPUT_DIRECTORY ${bad_plugin_folder})
add_dependencies(test_host misbehaving no_symbol unresolved)
target_compile_definitions(test_host PRIVATE PYRA_BAD_PLUGINS="${bad_plugin_folder}")
