# The merger that bench --compare has to notice: named like the real one, in a folder of its own.
set(overworked_folder ${CMAKE_BINARY_DIR}/tests/overworked_plugins)
add_library(overworked_tome MODULE ${folder}/overworked_tome.cpp)
target_link_libraries(overworked_tome PRIVATE pyra::pyra pyra_flags)
set_target_properties(overworked_tome PROPERTIES
  PREFIX lib OUTPUT_NAME pyra_merge_tome LIBRARY_OUTPUT_DIRECTORY ${overworked_folder}
  CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
add_dependencies(test_cli overworked_tome)
target_compile_definitions(test_cli PRIVATE PYRA_OVERWORKED_PLUGINS="${overworked_folder}")
