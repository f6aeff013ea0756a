#include "goldens.h"

#include <cstdlib>
#include <stdexcept>

namespace pyra::test {
namespace {

using Names = std::vector<std::pair<std::string, std::string>>;
const Names kLoraNames{{".lora_a", ".attn.qkv.lora_A.weight"}, {".lora_b", ".attn.qkv.lora_B.weight"}};
const Names kPyraNames{
    {".pyra_a", ".a"}, {".pyra_b", ".b"}, {".pyra_norm.weight", ".norm.weight"}, {".pyra_norm.bias", ".norm.bias"}};

/// The fixture's "peft." tensors by the names that the plugins declare.
sdk::TensorMap renamed(const Golden& golden, const Names& suffixes) {
  sdk::TensorMap tensors;
  for (const auto& [name, tensor] : golden.tensors)
    for (const auto& [from, to] : suffixes)
      if (name.starts_with("peft.") && name.ends_with(from))
        tensors.emplace(name.substr(5, name.size() - 5 - from.size()) + to, tensor.clone());
  return tensors;
}

}  // namespace

std::filesystem::path goldens_folder() {
  const char* other = std::getenv("PYRA_GOLDENS");
  return other && *other ? std::filesystem::path(other) : std::filesystem::path(PYRA_TEST_DATA) / "goldens";
}

const at::Tensor& Golden::at(const std::string& tensor) const {
  const auto found = tensors.find(tensor);
  if (found == tensors.end()) throw std::runtime_error("fixture " + name + " has no tensor " + tensor);
  return found->second;
}

Golden read_golden(const std::string& name) {
  const io::SafetensorsFile file(goldens_folder() / (name + ".safetensors"));
  const auto describe = file.metadata().find("describe");
  if (describe == file.metadata().end()) throw std::runtime_error("fixture " + name + " does not describe itself");
  return {.name = name, .describe = nlohmann::json::parse(describe->second), .tensors = file.tensors()};
}

nn::VitConfig golden_config(const Golden& golden) {
  const nlohmann::json& config = golden.describe.at("config");
  if (config.at("gelu") != "erf") throw std::runtime_error("fixture " + golden.name + " wants another GELU");
  return {.arch = golden.name,
          .image_size = config.at("img_size"),
          .patch_size = config.at("patch_size"),
          .embed_dim = config.at("embed_dim"),
          .depth = config.at("depth"),
          .num_heads = config.at("num_heads"),
          .mlp_dim = golden.at("model.blocks.0.mlp.fc1.weight").size(0),
          .num_classes = config.at("num_classes"),
          .pool = golden.has("model.fc_norm.weight") ? nn::Pool::avg : nn::Pool::token,
          .distilled = golden.has("model.dist_token"),
          .norm_eps = config.at("eps")};
}

nn::Vit golden_model(const Golden& golden) {
  sdk::TensorMap weights;
  const std::string prefix = "model.";
  for (const auto& [name, tensor] : golden.tensors)
    if (name.starts_with(prefix)) weights.emplace(name.substr(prefix.size()), tensor.clone());
  return {golden_config(golden), std::move(weights)};
}

const host::PluginRegistry& built_plugins() {
  static const host::PluginRegistry registry({PYRA_PLUGIN_DIR});
  return registry;
}

void attach_golden_lora(nn::Vit& vit, const Golden& golden) {
  auto setup = std::make_unique<nn::PeftSetup>();
  const int64_t rank = golden.describe.at("lora_rank");
  const double scale = golden.describe.at("lora_scale");
  setup->name = "lora";
  setup->method =
      built_plugins().peft("lora", {{"rank", rank}, {"alpha", scale * double(rank)}, {"dropout", 0.0}}, "test");
  setup->learned = renamed(golden, kLoraNames);
  vit.set_peft(std::move(setup));
}

void attach_golden_pyra(nn::Vit& vit, const Golden& golden) {
  const double eps = golden.describe.at("pyra_norm_eps");
  auto setup = std::make_unique<nn::MergeSetup>();
  setup->name = "pyra";
  setup->merger = built_plugins().merger("pyra", {{"norm_eps", eps}}, "test");
  setup->schedule = setup->merger->resolve(
      {.text = "fixture", .remove = golden.describe.at("remove"), .prune = {}, .merge = {}}, vit.config().shape());
  setup->learned = renamed(golden, kPyraNames);
  vit.set_merge(std::move(setup));
}

std::string trained_name(const std::string& golden_name) {
  const auto with = [&](const std::string& prefix, const Names& names) {
    for (const auto& [from, to] : names)
      if (golden_name.ends_with(from)) return prefix + golden_name.substr(0, golden_name.size() - from.size()) + to;
    return std::string();
  };
  if (const std::string lora = with("peft.lora.", kLoraNames); !lora.empty()) return lora;
  const std::string pyra = with("merge.pyra.", kPyraNames);
  return pyra.empty() ? golden_name : pyra;
}

}  // namespace pyra::test
