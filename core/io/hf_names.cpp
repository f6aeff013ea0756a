#include "io/hf_names.h"

#include <array>
#include <string_view>

#include "base/error.h"

namespace pyra::io {
namespace {

struct Layer {
  std::string_view timm;
  std::array<std::string_view, 2> hf;  ///< by spelling
};

constexpr Layer kBlockLayers[] = {{"norm1", {"layernorm_before", "layernorm_before"}},
                                  {"norm2", {"layernorm_after", "layernorm_after"}},
                                  {"attn.proj", {"attention.output.dense", "attention.o_proj"}},
                                  {"mlp.fc1", {"intermediate.dense", "mlp.fc1"}},
                                  {"mlp.fc2", {"output.dense", "mlp.fc2"}}};
constexpr std::array<std::array<std::string_view, 3>, 2> kParts = {
    {{"attention.attention.query", "attention.attention.key", "attention.attention.value"},
     {"attention.q_proj", "attention.k_proj", "attention.v_proj"}}};

/// "blocks.3.attn.qkv.weight" as number 3, layer "attn.qkv", end ".weight".
std::vector<std::string> block_names(std::string_view name, const std::string& model, HfSpelling spelling) {
  name.remove_prefix(std::string_view("blocks.").size());
  const size_t dot = name.find('.'), end = name.rfind('.');
  const std::string_view number = name.substr(0, dot), layer = name.substr(dot + 1, end - dot - 1);
  const auto index = size_t(spelling);
  const char* stack = spelling == HfSpelling::on_disk ? ".encoder.layer." : ".layers.";
  const auto full = [&](std::string_view part) { return cat(model, stack, number, ".", part, name.substr(end)); };
  if (layer == "attn.qkv") return {full(kParts[index][0]), full(kParts[index][1]), full(kParts[index][2])};
  for (const Layer& known : kBlockLayers)
    if (known.timm == layer) return {full(known.hf[index])};
  fail(ExitCode::internal, "no Hugging Face name for a block's ", layer);
}

}  // namespace

std::vector<std::string> hf_names(const std::string& name, const std::string& model, bool distilled,
                                  HfSpelling spelling) {
  if (name.starts_with("blocks.")) return block_names(name, model, spelling);
  if (name == "cls_token") return {model + ".embeddings.cls_token"};
  if (name == "dist_token") return {model + ".embeddings.distillation_token"};
  if (name == "pos_embed") return {model + ".embeddings.position_embeddings"};
  const size_t dot = name.rfind('.');
  const std::string end = dot == name.npos ? "" : name.substr(dot);
  if (name.starts_with("patch_embed.proj")) return {model + ".embeddings.patch_embeddings.projection" + end};
  if (name.starts_with("norm.")) return {model + ".layernorm" + end};
  if (name.starts_with("head_dist.")) return {"distillation_classifier" + end};
  if (name.starts_with("head.")) return {(distilled ? "cls_classifier" : "classifier") + end};
  fail(ExitCode::internal, "no Hugging Face name for tensor '", name, "'");
}

}  // namespace pyra::io
