// The parity fixtures: numbers computed by the methods' reference programs. Everything a test needs to know of a
// fixture (configuration, schedule, counts) is read from the file itself, so that
// PYRA_GOLDENS=DIR ctest -L parity runs the same tests on another set with other shapes.
#pragma once
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "host/plugin_registry.h"
#include "io/safetensors.h"
#include "nn/vit.h"

namespace pyra::test {

/// tests/data/goldens, or $PYRA_GOLDENS.
[[nodiscard]] std::filesystem::path goldens_folder();

struct Golden {
  std::string name;         ///< "vit_tome"
  nlohmann::json describe;  ///< the file's own description
  sdk::TensorMap tensors;

  [[nodiscard]] bool has(const std::string& tensor) const { return tensors.contains(tensor); }
  [[nodiscard]] const at::Tensor& at(const std::string& tensor) const;
};

[[nodiscard]] Golden read_golden(const std::string& name);

/// The model in a fixture that holds "model." tensors: config from its description, the rest from its tensors.
[[nodiscard]] nn::VitConfig golden_config(const Golden& golden);
[[nodiscard]] nn::Vit golden_model(const Golden& golden);

/// The plugins that were built with the tests.
[[nodiscard]] const host::PluginRegistry& built_plugins();

/// LoRA and PYRA as the fixture describes them, with its "peft." tensors.
void attach_golden_lora(nn::Vit& vit, const Golden& golden);
void attach_golden_pyra(nn::Vit& vit, const Golden& golden);

/// "blocks.0.lora_a" -> "peft.lora.blocks.0.attn.qkv.lora_A.weight": a fixture's name of a trained tensor as
/// Vit::train_mode() has it.
[[nodiscard]] std::string trained_name(const std::string& golden_name);

}  // namespace pyra::test
