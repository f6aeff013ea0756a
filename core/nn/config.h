// A vision transformer described by data: ViT, DeiT (distilled, III), average-pooled MAE and DINOv2 models differ in
// these fields, not in classes.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "sdk/model_shape.h"
#include "sdk/tensor_decl.h"

namespace pyra::nn {

enum class Pool {
  token,  ///< class token after the final norm; distilled: both tokens, each with its head, logits averaged
  avg,    ///< mean of patch tokens after the last block (not weighted by size), then fc_norm: MAE
};

struct VitConfig {
  std::string arch;  ///< timm's name where there is one ("vit_base_patch16_224"), else as in the file
  int64_t image_size = 224;
  int64_t patch_size = 16;
  int64_t embed_dim = 768;
  int64_t depth = 12;
  int64_t num_heads = 12;
  int64_t mlp_dim = 3072;
  int64_t num_classes = 1000;
  Pool pool = Pool::token;
  bool distilled = false;
  int64_t registers = 0;  ///< DINOv2's register tokens, after the class (and distillation) token: arXiv 2309.16588
  bool no_embed_class = false;  ///< pos_embed has patches only: DeiT-III, DINOv2 with registers (timm's name)
  /// The model came with a LayerScale (arXiv 2103.17239) after each branch. It is multiplied into proj and fc2 when the
  /// model is read, so nothing here computes it; a timm file gets scales of one back.
  bool layer_scale = false;
  double norm_eps = 1e-6;
  bool operator==(const VitConfig&) const = default;

  [[nodiscard]] int64_t protected_tokens() const { return 1 + (distilled ? 1 : 0) + registers; }
  [[nodiscard]] int64_t patches() const { return (image_size / patch_size) * (image_size / patch_size); }
  [[nodiscard]] int64_t tokens() const { return patches() + protected_tokens(); }
  [[nodiscard]] sdk::ModelShape shape() const;
};

/// The names and shapes (timm's spelling) of every tensor of such a model, in file order.
struct TensorShape {
  std::string name;
  std::vector<int64_t> shape;
};
[[nodiscard]] std::vector<TensorShape> tensor_shapes(const VitConfig& config);

/// The tokens before the patches as they enter block 0, and what is added to the patches.
struct Embedding {
  at::Tensor prefix;     ///< [1,protected,C] class, distillation and register tokens, their positions added
  at::Tensor positions;  ///< [1,patches,C]
};
[[nodiscard]] Embedding embedding_of(const VitConfig& config, const sdk::TensorMap& weights);

/// Throws Error(usage or input) naming the field when a config cannot be built: sizes not positive or above
/// the limits below, embed_dim not divisible by num_heads, image not divisible by patch. `where` opens the text.
void check_config(const VitConfig& config, const std::string& where);

// Limits on what a file may ask for; far above any published ViT.
inline constexpr int64_t kMaxDepth = 256, kMaxEmbedDim = 16384, kMaxImageSize = 4096, kMaxClasses = 1 << 20,
                         kMaxRegisters = 64;

/// timm's name -> config ("vit_small_patch16_224", "deit_base_distilled_patch16_224", "deit3_base_patch16_224",
/// "vit_base_patch14_reg4_dinov2", "vit_ti_patch8_112", "mae_vit_base_patch16" …); sizes ti, tiny, s, small, b, base,
/// l, large, h, huge, any patch and resolution. Throws Error(usage) naming the nearest known name.
[[nodiscard]] VitConfig arch_config(const std::string& name);
[[nodiscard]] std::vector<std::string> known_archs();
/// The other way round: "vit_base_patch16_384", "deit_small_distilled_patch16_224", "mae_vit_base_patch16" (average
/// pooling) for what has that size, patch, resolution and pooling; "" where there is no such name. A plain DeiT is
/// named as the ViT that it is.
[[nodiscard]] std::string arch_name(const VitConfig& config);

/// Multiply-adds of one image. tokens_after is the count leaving each block, or empty for dense. (The sum:
/// patch embedding N·C·3P², N with the class token, + per block 4NC² + 2N²C before the reduction and 2·N'·C·mlp after +
/// classifier.)
[[nodiscard]] int64_t count_macs(const VitConfig& config, const std::vector<int64_t>& tokens_after = {});

/// Named and written schedules -> one entry a block. "low", "high", "dense", "13", "8@-0.5", "16,8,4", "file.toml".
/// low and high are the paper's lists at 197 tokens and 12 or 24 blocks (198 distilled), scaled in proportion
/// elsewhere. Throws Error(usage).
[[nodiscard]] sdk::Schedule parse_schedule(const std::string& text, const VitConfig& config);

}  // namespace pyra::nn
