// LoRA (arXiv 2106.09685): y += scale (dropout(x) Aᵀ) Bᵀ beside a frozen linear layer; B starts at zero.
//
// q, k and v are rows of one fused layer. A method that adapts only some of them keeps B in full height and its other
// rows at zero, which is how PEFT's files hold such an adapter, so that peft can read it.
#include <charconv>
#include <cmath>

#include <ATen/Functions.h>

#include "base/error.h"
#include "sdk/linear_site.h"
#include "sdk/plugin.h"

namespace {

using namespace pyra::sdk;

constexpr int64_t kFusedParts = 3;

struct Layer {
  LinearKind kind;
  const char* target;       ///< what the parameter calls it
  const char* peft_module;  ///< what adapter_config.json calls it
};
constexpr Layer kLayers[] = {{LinearKind::qkv, "qkv", "attn.qkv"},
                             {LinearKind::proj, "proj", "attn.proj"},
                             {LinearKind::fc1, "fc1", "mlp.fc1"},
                             {LinearKind::fc2, "fc2", "mlp.fc2"}};

/// The shortest digits that are this very number: peft has to scale as we do.
std::string digits(double value) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
}

bool contains(const std::vector<std::string>& items, std::string_view item) {
  return std::find(items.begin(), items.end(), item) != items.end();
}

class Lora final : public PeftMethod {
 public:
  static std::vector<Parameter> parameters() {
    return {{.name = "rank", .default_value = int64_t{8}, .help = "rows of A", .minimum = 1, .maximum = 4096},
            {.name = "alpha",
             .default_value = 0.0,
             .help = "the term is scaled by alpha / rank; 0 means alpha = rank",
             .minimum = 0.0},
            {.name = "dropout",
             .default_value = 0.1,
             .help = "on the input of A, in training",
             .minimum = 0.0,
             .maximum = 0.99},
            {.name = "targets",
             .default_value = std::vector<std::string>{"qkv"},
             .help = "layers that get a term; q, k and v are parts of the fused qkv",
             .choices = {"qkv", "q", "k", "v", "proj", "fc1", "fc2"}},
            {.name = "rslora", .default_value = false, .help = "scale by alpha / sqrt(rank) instead"}};
  }

  explicit Lora(const Parameters& parameters)
      : rank_(parameters.integer("rank")),
        alpha_(parameters.number("alpha") == 0 ? double(rank_) : parameters.number("alpha")),
        dropout_(parameters.number("dropout")),
        rank_stabilised_(parameters.boolean("rslora")) {
    const auto& targets = parameters.list("targets");
    if (targets.empty()) {
      pyra::fail(pyra::ExitCode::usage,
                 "lora: targets is empty; expected at least one of qkv, q, k, v, proj, fc1, fc2");
    }
    const bool whole = contains(targets, "qkv");
    parts_ = {whole || contains(targets, "q"), whole || contains(targets, "k"), whole || contains(targets, "v")};
    for (size_t i = 0; i < std::size(kLayers); ++i) targeted_[i] = contains(targets, kLayers[i].target);
    targeted_[0] = parts_[0] || parts_[1] || parts_[2];
  }

  [[nodiscard]] std::vector<TensorDecl> declare(const ModelShape& shape) const override {
    std::vector<TensorDecl> tensors;
    for (int64_t block = 0; block < shape.depth; ++block) {
      for (size_t i = 0; i < std::size(kLayers); ++i) {
        if (!targeted_[i]) continue;
        const LinearSite site = linear_site(shape, block, kLayers[i].kind);
        tensors.push_back(
            {.name = site.name() + kA, .shape = {rank_, site.in}, .init = Init::kaiming_uniform, .fan_in = site.in});
        tensors.push_back({.name = site.name() + kB, .shape = {site.out, rank_}, .init = Init::zeros});
      }
    }
    return tensors;
  }

  [[nodiscard]] std::optional<LowRank> low_rank(const LinearSite& site, const TensorMap& learned) const override {
    if (!targeted_[size_t(site.kind)]) return std::nullopt;
    at::Tensor b = learned.at(site.name() + kB);
    if (site.kind == LinearKind::qkv) b = only_targeted_parts(b);
    return LowRank{.a = learned.at(site.name() + kA), .b = b, .scale = scale(), .dropout = dropout_};
  }

  [[nodiscard]] bool mergeable() const override { return true; }

  [[nodiscard]] std::string adapter_config(const ModelShape&) const override {
    std::vector<std::string> modules;
    for (size_t i = 0; i < std::size(kLayers); ++i) {
      if (targeted_[i]) modules.push_back(pyra::cat('"', kLayers[i].peft_module, '"'));
    }
    return pyra::cat(R"({"peft_type": "LORA", "r": )", rank_, R"(, "lora_alpha": )", digits(alpha_),
                     R"(, "lora_dropout": )", digits(dropout_), R"(, "target_modules": [)", pyra::join(modules),
                     R"(], "bias": "none", "fan_in_fan_out": false, "use_rslora": )",
                     rank_stabilised_ ? "true" : "false", R"(, "modules_to_save": ["head"]})");
  }

 private:
  static constexpr const char* kA = ".lora_A.weight";
  static constexpr const char* kB = ".lora_B.weight";

  [[nodiscard]] double scale() const { return alpha_ / (rank_stabilised_ ? std::sqrt(double(rank_)) : double(rank_)); }

  /// B with the rows of untargeted parts cut off from the gradient; they are zero and so stay zero.
  [[nodiscard]] at::Tensor only_targeted_parts(const at::Tensor& b) const {
    if (parts_[0] && parts_[1] && parts_[2]) return b;
    std::vector<at::Tensor> rows = b.chunk(kFusedParts);
    for (size_t i = 0; i < rows.size(); ++i) {
      if (!parts_[i]) rows[i] = at::zeros_like(rows[i]);
    }
    return at::cat(rows);
  }

  int64_t rank_;
  double alpha_;
  double dropout_;
  bool rank_stabilised_;
  std::array<bool, kFusedParts> parts_{};            // q, k, v
  std::array<bool, std::size(kLayers)> targeted_{};  // by LinearKind
};

}  // namespace

PYRA_PEFT_PLUGIN(Lora, "lora", "1.0", "Low-rank terms beside frozen linear layers (LoRA, arXiv 2106.09685)")
