# pyra_add_plugin(KIND NAME FILES...): libpyra_<kind>_<name>.so, with everything hidden but its entry.
# Works inside the project and, through find_package(pyra), outside it.
function(pyra_add_plugin kind name)
  set(target pyra_${kind}_${name})
  add_library(${target} MODULE ${ARGN})
  target_link_libraries(${target} PRIVATE pyra::pyra)
  target_compile_features(${target} PRIVATE cxx_std_20)
  set_target_properties(${target} PROPERTIES
    PREFIX lib
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib/pyra/plugins
    INSTALL_RPATH "$ORIGIN/../..")
  install(TARGETS ${target} LIBRARY DESTINATION lib/pyra/plugins)
endfunction()
