// The entry of a plugin: one C symbol and the tag that says what it was built with.
//
//   class Tome final : public pyra::sdk::TokenMerger { ... };
//   PYRA_MERGE_PLUGIN(Tome, "tome", "1.0", "Bipartite soft matching (ToMe, arXiv 2210.09461)")
//
// The class offers `static std::vector<Parameter> parameters()` and a constructor from `const Parameters&`.
#pragma once
#include <torch/headeronly/version.h>

#include <memory>
#include <vector>

#include "sdk/parameters.h"
#include "sdk/peft_method.h"
#include "sdk/token_merger.h"

/// Raised whenever a class or struct of sdk/ changes its layout or its virtual functions.
#define PYRA_SDK_VERSION 2

#define PYRA_TEXT_(x) #x
#define PYRA_TEXT(x) PYRA_TEXT_(x)
/// SDK version, LibTorch version, C++ ABI: a plugin built with others is refused before its code runs.
#define PYRA_ABI_TAG \
  "pyra-sdk " PYRA_TEXT(PYRA_SDK_VERSION) " libtorch " PYRA_TEXT(TORCH_VERSION_MAJOR) "." PYRA_TEXT( \
      TORCH_VERSION_MINOR) "." PYRA_TEXT(TORCH_VERSION_PATCH) " cxxabi " PYRA_TEXT(__GXX_ABI_VERSION) " cxx11 " PYRA_TEXT(_GLIBCXX_USE_CXX11_ABI)

/// What the entry symbol returns. The first two members keep their place for ever, so that a tag can be
/// read from a plugin of any version; nothing else is touched before the tag was found equal.
struct PyraPlugin {
  const char* abi_tag;
  const char* kind;  ///< "merge" or "peft"
  const char* name;
  const char* version;
  const char* description;
  std::vector<pyra::sdk::Parameter> (*parameters)();
  pyra::sdk::TokenMerger* (*create_merger)(const pyra::sdk::Parameters&);  ///< null for a PEFT plugin
  pyra::sdk::PeftMethod* (*create_peft)(const pyra::sdk::Parameters&);     ///< null for a merge plugin
};

#define PYRA_PLUGIN_ENTRY pyra_plugin_entry
#define PYRA_EXPORT __attribute__((visibility("default")))

#define PYRA_MERGE_PLUGIN(Class, Name, Version, Description)                                    \
  extern "C" PYRA_EXPORT const PyraPlugin* pyra_plugin_entry() {                                \
    static const PyraPlugin plugin{                                                             \
        PYRA_ABI_TAG,                                                                           \
        "merge",                                                                                \
        Name,                                                                                   \
        Version,                                                                                \
        Description,                                                                            \
        &Class::parameters,                                                                     \
        [](const pyra::sdk::Parameters& p) -> pyra::sdk::TokenMerger* { return new Class(p); }, \
        nullptr};                                                                               \
    return &plugin;                                                                             \
  }

#define PYRA_PEFT_PLUGIN(Class, Name, Version, Description)                              \
  extern "C" PYRA_EXPORT const PyraPlugin* pyra_plugin_entry() {                         \
    static const PyraPlugin plugin{                                                      \
        PYRA_ABI_TAG, "peft",                                                            \
        Name,         Version,                                                           \
        Description,  &Class::parameters,                                                \
        nullptr,      [](const pyra::sdk::Parameters& p) -> pyra::sdk::PeftMethod* { return new Class(p); }}; \
    return &plugin;                                                                      \
  }
