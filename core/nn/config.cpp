#include "nn/config.h"

#include <ATen/Functions.h>

#include <array>
#include <charconv>
#include <regex>

#include "base/error.h"

namespace pyra::nn {
namespace {

struct Size {
  const char* name;
  const char* short_name;
  int64_t embed_dim, depth, num_heads;
};

// Dosovitskiy et al. (arXiv 2010.11929) table 1 and Touvron et al. (arXiv 2012.12877) table 1.
constexpr std::array<Size, 5> kSizes{{
    {"tiny", "ti", 192, 12, 3},
    {"small", "s", 384, 12, 6},
    {"base", "b", 768, 12, 12},
    {"large", "l", 1024, 24, 16},
    {"huge", "h", 1280, 32, 16},
}};

const Size* find_size(const std::string& name) {
  for (const Size& size : kSizes)
    if (name == size.name || name == size.short_name) return &size;
  return nullptr;
}

int64_t to_number(const std::string& digits) {
  int64_t value = 0;
  std::from_chars(digits.data(), digits.data() + digits.size(), value);
  return value;
}

void check_range(const std::string& where, const char* field, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    fail(ExitCode::input, where, ": ", field, " is ", value, ", expected ", low, " to ", high);
}

}  // namespace

sdk::ModelShape VitConfig::shape() const {
  return {.depth = depth,
          .embed_dim = embed_dim,
          .num_heads = num_heads,
          .mlp_dim = mlp_dim,
          .tokens = tokens(),
          .protected_tokens = protected_tokens(),
          .num_classes = num_classes};
}

void check_config(const VitConfig& config, const std::string& where) {
  check_range(where, "depth", config.depth, 1, kMaxDepth);
  check_range(where, "embed_dim", config.embed_dim, 1, kMaxEmbedDim);
  check_range(where, "num_heads", config.num_heads, 1, config.embed_dim);
  check_range(where, "mlp_dim", config.mlp_dim, 1, 8 * kMaxEmbedDim);
  check_range(where, "image_size", config.image_size, 1, kMaxImageSize);
  check_range(where, "patch_size", config.patch_size, 1, config.image_size);
  check_range(where, "num_classes", config.num_classes, 0, kMaxClasses);
  check_range(where, "registers", config.registers, 0, kMaxRegisters);
  if (config.embed_dim % config.num_heads != 0)
    fail(ExitCode::input, where, ": embed_dim ", config.embed_dim, " is not a multiple of num_heads ",
         config.num_heads);
  if (config.image_size % config.patch_size != 0)
    fail(ExitCode::input, where, ": image_size ", config.image_size, " is not a multiple of patch_size ",
         config.patch_size);
  if (!(config.norm_eps > 0 && config.norm_eps < 1))
    fail(ExitCode::input, where, ": norm_eps is ", config.norm_eps, ", expected more than 0 and less than 1");
  if (config.distilled && config.pool == Pool::avg)
    fail(ExitCode::input, where, ": a distilled model is pooled by its tokens, not by average");
}

std::vector<TensorShape> tensor_shapes(const VitConfig& config) {
  const int64_t dim = config.embed_dim, mlp = config.mlp_dim;
  std::vector<TensorShape> shapes;
  const auto layer = [&](const std::string& name, std::vector<int64_t> weight) {
    const int64_t out = weight.front();
    shapes.push_back({name + ".weight", std::move(weight)});
    shapes.push_back({name + ".bias", {out}});
  };
  shapes.push_back({"cls_token", {1, 1, dim}});
  if (config.distilled) shapes.push_back({"dist_token", {1, 1, dim}});
  if (config.registers > 0) shapes.push_back({"reg_token", {1, config.registers, dim}});
  shapes.push_back({"pos_embed", {1, config.no_embed_class ? config.patches() : config.tokens(), dim}});
  layer("patch_embed.proj", {dim, 3, config.patch_size, config.patch_size});
  for (int64_t i = 0; i < config.depth; ++i) {
    const std::string block = cat("blocks.", i, ".");
    layer(block + "norm1", {dim});
    layer(block + "attn.qkv", {3 * dim, dim});
    layer(block + "attn.proj", {dim, dim});
    layer(block + "norm2", {dim});
    layer(block + "mlp.fc1", {mlp, dim});
    layer(block + "mlp.fc2", {dim, mlp});
  }
  layer(config.pool == Pool::avg ? "fc_norm" : "norm", {dim});
  if (config.num_classes > 0) {
    layer("head", {config.num_classes, dim});
    if (config.distilled) layer("head_dist", {config.num_classes, dim});
  }
  return shapes;
}

Embedding embedding_of(const VitConfig& config, const sdk::TensorMap& weights) {
  std::vector<at::Tensor> tokens{weights.at("cls_token")};
  if (config.distilled) tokens.push_back(weights.at("dist_token"));
  if (config.registers > 0) tokens.push_back(weights.at("reg_token"));
  const at::Tensor prefix = tokens.size() == 1 ? tokens[0] : at::cat(tokens, 1);
  const at::Tensor& positions = weights.at("pos_embed");
  if (config.no_embed_class) return {prefix, positions};
  const int64_t first = config.protected_tokens();
  return {prefix + positions.narrow(1, 0, first), positions.narrow(1, first, config.patches()).contiguous()};
}

VitConfig arch_config(const std::string& name) {
  constexpr size_t kMaxArchBytes = 256;  // std::regex recurses once a character
  // timm appends the name of the pretraining after a dot; it does not change the architecture.
  static const std::regex pattern(
      R"((vit|deit|deit3|mae_vit)_([a-z]+)(_distilled)?_patch([0-9]{1,3})(?:_reg([0-9]{1,2}))?(?:_([0-9]{1,4}))?(_dinov2)?(\..*)?)");
  std::smatch match;
  const Size* size = nullptr;
  if (name.size() <= kMaxArchBytes && std::regex_match(name, match, pattern)) size = find_size(match[2]);
  if (!size)
    fail(ExitCode::usage, "'", printable(name), "' is not a known architecture", did_you_mean(name, known_archs()),
         " (known: vit_, deit_, deit3_ and mae_vit_ names of sizes tiny, small, base, large and huge, as "
         "vit_base_patch16_224 or vit_base_patch14_reg4_dinov2)");
  VitConfig config;
  config.arch = name;
  config.patch_size = to_number(match[4]);
  const bool dinov2 = match[7].matched, deit3 = match[1] == "deit3";
  config.image_size = match[6].matched ? to_number(match[6]) : dinov2 ? 518 : 224;
  config.embed_dim = size->embed_dim;
  config.depth = size->depth;
  config.num_heads = size->num_heads;
  config.mlp_dim = 4 * size->embed_dim;
  config.distilled = match[3].matched;
  config.registers = match[5].matched ? to_number(match[5]) : 0;
  config.layer_scale = dinov2 || deit3;
  config.no_embed_class = deit3 || (dinov2 && config.registers > 0);
  config.pool = match[1] == "mae_vit" ? Pool::avg : Pool::token;
  check_config(config, "architecture '" + name + "'");
  return config;
}

std::string arch_name(const VitConfig& config) {
  for (const Size& size : kSizes) {
    if (config.embed_dim != size.embed_dim || config.depth != size.depth || config.num_heads != size.num_heads ||
        config.mlp_dim != 4 * size.embed_dim)
      continue;
    if (config.pool == Pool::avg) return cat("mae_vit_", size.name, "_patch", config.patch_size);
    return cat(config.distilled ? "deit_" : "vit_", size.name, config.distilled ? "_distilled" : "", "_patch",
               config.patch_size, "_", config.image_size);
  }
  return "";
}

std::vector<std::string> known_archs() {
  return {"vit_tiny_patch16_224",
          "vit_small_patch16_224",
          "vit_small_patch32_224",
          "vit_base_patch16_224",
          "vit_base_patch16_384",
          "vit_base_patch32_224",
          "vit_base_patch8_224",
          "vit_large_patch16_224",
          "vit_large_patch16_384",
          "vit_huge_patch14_224",
          "deit_tiny_patch16_224",
          "deit_small_patch16_224",
          "deit_base_patch16_224",
          "deit_tiny_distilled_patch16_224",
          "deit_small_distilled_patch16_224",
          "deit_base_distilled_patch16_224",
          "deit3_small_patch16_224",
          "deit3_base_patch16_224",
          "deit3_large_patch16_224",
          "deit3_huge_patch14_224",
          "vit_small_patch14_dinov2",
          "vit_base_patch14_dinov2",
          "vit_large_patch14_dinov2",
          "vit_small_patch14_reg4_dinov2",
          "vit_base_patch14_reg4_dinov2",
          "vit_large_patch14_reg4_dinov2",
          "mae_vit_base_patch16",
          "mae_vit_large_patch16",
          "mae_vit_huge_patch14",
          "vit_ti_patch8_112",
          "vit_s_patch8_112"};
}

int64_t count_macs(const VitConfig& config, const std::vector<int64_t>& tokens_after) {
  const int64_t dim = config.embed_dim;
  int64_t tokens = config.tokens();
  // DiffRate's count, which the field compares by, takes the class token as one more patch here.
  int64_t macs = tokens * dim * 3 * config.patch_size * config.patch_size;
  for (int64_t i = 0; i < config.depth; ++i) {
    macs += 4 * tokens * dim * dim + 2 * tokens * tokens * dim;
    if (!tokens_after.empty()) tokens = tokens_after.at(size_t(i));
    macs += 2 * tokens * dim * config.mlp_dim;
  }
  return macs + dim * config.num_classes * (config.distilled ? 2 : 1);
}

}  // namespace pyra::nn
