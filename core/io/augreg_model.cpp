#include "io/augreg_model.h"

#include <ATen/ATen.h>

#include <set>

#include "base/error.h"
#include "io/named_tensors.h"
#include "io/npz.h"

namespace pyra::io {
namespace {

/// What big_vision calls otherwise than the programs before it.
struct Spelling {
  std::string prefix;
  std::string positions = "Transformer/posembed_input/pos_embedding";
  std::string attention = "MultiHeadDotProductAttention_1/";
  std::string norm2 = "LayerNorm_2/";
  std::string mlp = "MlpBlock_3/";
  bool stacked = false;  ///< one array for all blocks, along axis 0
};

/// One file on its way to timm's names.
class AugregReader {
 public:
  explicit AugregReader(const std::filesystem::path& path) : file_(path), spelling_(find_spelling()) {
    tensors_ = file_.read([&](const std::string& name) { return name.starts_with(spelling_.prefix); });
  }

  [[nodiscard]] NamedTensors read();

 private:
  [[nodiscard]] Spelling find_spelling() const;
  [[nodiscard]] int64_t count_blocks() const;
  void read_block(int64_t block);
  void read_attention(const std::string& from, int64_t block, const std::string& to);

  [[nodiscard]] bool has(const std::string& name) const { return file_.arrays().contains(spelling_.prefix + name); }
  /// Of one block where they are stacked. -1 in `expected` is any size.
  [[nodiscard]] at::Tensor take(const std::string& name, std::vector<int64_t> expected, int64_t block = 0);
  void put(const std::string& name, const at::Tensor& tensor) { named_.emplace(name, tensor.contiguous()); }
  void put_norm(const std::string& from, const std::string& to, int64_t block = 0) {
    put(to + ".weight", take(from + "scale", {dim_}, block));
    put(to + ".bias", take(from + "bias", {dim_}, block));
  }
  void put_dense(const std::string& from, const std::string& to, std::vector<int64_t> expected, int64_t block = 0) {
    const at::Tensor kernel = take(from + "kernel", std::move(expected), block);
    put(to + ".weight", kernel.t());
    put(to + ".bias", take(from + "bias", {kernel.size(1)}, block));
  }
  void check_left_over() const;

  NpzFile file_;
  Spelling spelling_;
  sdk::TensorMap tensors_, named_;
  std::set<std::string> used_;
  int64_t dim_ = -1, heads_ = -1;
};

Spelling AugregReader::find_spelling() const {
  for (const char* prefix : {"", "opt/target/", "params/"}) {
    if (!file_.arrays().contains(cat(prefix, "embedding/kernel"))) continue;
    Spelling spelling{.prefix = prefix};
    if (spelling.prefix == "params/")
      spelling = {.prefix = prefix,
                  .positions = "pos_embedding",
                  .attention = "MultiHeadDotProductAttention_0/",
                  .norm2 = "LayerNorm_1/",
                  .mlp = "MlpBlock_0/"};
    spelling.stacked = file_.arrays().contains(cat(prefix, "Transformer/encoderblock/LayerNorm_0/scale"));
    return spelling;
  }
  fail(ExitCode::input, file_.path().string(),
       ": has no array 'embedding/kernel', with or without 'opt/target/' or "
       "'params/' before it: no ViT of Google's (augreg, big_vision)");
}

at::Tensor AugregReader::take(const std::string& name, std::vector<int64_t> expected, int64_t block) {
  const std::string full = spelling_.prefix + name;
  const bool stacked = spelling_.stacked && name.starts_with("Transformer/encoderblock/");
  if (stacked) expected.insert(expected.begin(), -1);
  const auto found = tensors_.find(full);
  if (found == tensors_.end())
    fail(ExitCode::input, file_.path().string(), ": has no array '", full, "', expected in such a file");
  const at::Tensor& tensor = found->second;
  bool fits = tensor.dim() == int64_t(expected.size());
  for (size_t i = 0; fits && i < expected.size(); ++i)
    fits = expected[i] == -1 ? tensor.size(int64_t(i)) > 0 : tensor.size(int64_t(i)) == expected[i];
  if (fits && stacked) fits = block < tensor.size(0);
  if (!fits)
    fail(ExitCode::input, file_.path().string(), ": array '", full, "' has shape ", tensor.sizes(), ", expected [",
         join(expected), "] (-1: any size", stacked ? "; one of each block first)" : ")");
  used_.insert(full);
  return (stacked ? tensor.select(0, block) : tensor).to(at::kFloat);
}

int64_t AugregReader::count_blocks() const {
  if (spelling_.stacked) {
    const auto& shape =
        file_.arrays().find(spelling_.prefix + "Transformer/encoderblock/LayerNorm_0/scale")->second.shape;
    return shape.empty() ? 0 : std::min(shape[0], nn::kMaxDepth + 1);
  }
  int64_t depth = 0;
  while (depth <= nn::kMaxDepth && has(cat("Transformer/encoderblock_", depth, "/LayerNorm_0/scale"))) ++depth;
  return depth;
}

/// Flax keeps heads apart: query [C,H,D] and out [H,D,C]; timm stacks q, k and v as one [3C,C].
void AugregReader::read_attention(const std::string& from, int64_t block, const std::string& to) {
  std::vector<at::Tensor> weights, biases;
  for (const char* part : {"query/", "key/", "value/"}) {
    const at::Tensor kernel = take(cat(from, part, "kernel"), {dim_, heads_, heads_ < 0 ? -1 : dim_ / heads_}, block);
    if (heads_ < 0) heads_ = kernel.size(1);
    if (heads_ * kernel.size(2) != dim_)
      fail(ExitCode::input, file_.path().string(), ": array '", spelling_.prefix, from, part, "kernel' has ", heads_,
           " heads of ", kernel.size(2), " channels, expected ", dim_, " channels together");
    weights.push_back(kernel.reshape({dim_, dim_}).t());
    biases.push_back(take(cat(from, part, "bias"), {heads_, dim_ / heads_}, block).reshape({dim_}));
  }
  put(to + "qkv.weight", at::cat(weights));
  put(to + "qkv.bias", at::cat(biases));
  put(to + "proj.weight", take(from + "out/kernel", {heads_, dim_ / heads_, dim_}, block).reshape({dim_, dim_}).t());
  put(to + "proj.bias", take(from + "out/bias", {dim_}, block));
}

void AugregReader::read_block(int64_t block) {
  const std::string from =
      spelling_.stacked ? "Transformer/encoderblock/" : cat("Transformer/encoderblock_", block, "/");
  const std::string to = cat("blocks.", block, ".");
  put_norm(from + "LayerNorm_0/", to + "norm1", block);
  read_attention(from + spelling_.attention, block, to + "attn.");
  put_norm(from + spelling_.norm2, to + "norm2", block);
  put_dense(from + spelling_.mlp + "Dense_0/", to + "mlp.fc1", {dim_, -1}, block);
  put_dense(from + spelling_.mlp + "Dense_1/", to + "mlp.fc2", {-1, dim_}, block);
}

NamedTensors AugregReader::read() {
  const at::Tensor patches = take("embedding/kernel", {-1, -1, 3, -1});  // [P,P,3,C]
  dim_ = patches.size(3);
  put("patch_embed.proj.weight", patches.permute({3, 2, 0, 1}));
  put("patch_embed.proj.bias", take("embedding/bias", {dim_}));
  put("cls_token", take("cls", {1, 1, dim_}));
  put("pos_embed", take(spelling_.positions, {1, -1, dim_}));
  const int64_t depth = count_blocks();
  for (int64_t block = 0; block < depth; ++block) read_block(block);
  put_norm("Transformer/encoder_norm/", "norm");
  if (has("head/kernel")) put_dense("head/", "head", {dim_, -1});
  check_left_over();
  return named_tensors(file_.path().string(), std::move(named_),
                       {{"num_heads", std::to_string(heads_)}, {"mean", "0.5"}, {"std", "0.5"}});
}

/// An array without a place means another network than the one described: a pooling head, say.
void AugregReader::check_left_over() const {
  for (const auto& [name, tensor] : tensors_) {
    if (used_.contains(name) || name.starts_with(spelling_.prefix + "pre_logits/")) continue;
    fail(ExitCode::input, file_.path().string(), ": array '", printable(name),
         "' is none of a ViT with a class token and a linear head, the only kind that is read from .npz");
  }
}

}  // namespace

ModelFile read_augreg_model(const std::filesystem::path& path, const ReadModelOptions& options) {
  ModelFile model = timm_model(AugregReader(path).read(), options);
  model.config.arch = nn::arch_name(model.config);
  return model;
}

}  // namespace pyra::io
