#include "tasks/scaffold.h"

#include "base/error.h"
#include "io/atomic_file.h"

namespace pyra::tasks {
namespace {

// @name@ and @kind@ are replaced.
constexpr const char* kCMake = R"(cmake_minimum_required(VERSION 3.25)
project(pyra_@kind@_@name@ LANGUAGES CXX)

# Where pyra is installed: -DCMAKE_PREFIX_PATH=/path/to/pyra (and to LibTorch, if it is not the one pyra was built with).
find_package(pyra REQUIRED)

# Makes libpyra_@kind@_@name@.so in build/lib/pyra/plugins; pyractl knows the plugin by this file's name.
pyra_add_plugin(@kind@ @name@ @name@.cpp)
)";

constexpr const char* kReadme = R"(# @name@, a @kind@ plugin for pyractl

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH=/path/to/pyra
    cmake --build build
    pyractl plugins check build/lib/pyra/plugins/libpyra_@kind@_@name@.so
    export PYRA_PLUGIN_PATH=$PWD/build/lib/pyra/plugins
    pyractl plugins info @name@
@use@
A plugin works with the pyra SDK and the LibTorch that it was built with; built for others, it is refused by name.
)";

constexpr const char* kMergeUse =
    R"(    pyractl compress MODEL.safetensors --merge @name@ --schedule high --out FAST.safetensors
)";

constexpr const char* kPeftUse = R"(    pyractl finetune --recipe RECIPE.toml --set peft.name=@name@ --out RUN
)";

// The delimiter is none that clang-format takes for C++: it would format the text.
constexpr const char* kMerge =
    R"text(// @name@: merges away the patch tokens of the smallest norm, each into the kept token it resembles most.
#include <ATen/ATen.h>

#include "sdk/plugin.h"

using namespace pyra::sdk;

namespace {

class Merger final : public TokenMerger {
 public:
  // What a recipe ([merge]) or --set merge.KEY=VALUE may choose, with its default. `plugins info @name@` shows it.
  static std::vector<Parameter> parameters() {
    return {{.name = "largest", .default_value = false, .help = "merge the largest norms away instead"}};
  }

  explicit Merger(const Parameters& parameters) : largest_(parameters.boolean("largest")) {}

  // Called in every block where the schedule takes tokens. Look at the tensors, change none, return where each token
  // goes. An image's plan must depend on that image alone, and ties go to the lowest index (stable sorts do that).
  MergePlan plan(const MergeInputs& in, const Schedule& schedule) const override {
    const int64_t images = in.tokens.size(0), tokens = in.tokens.size(1), channels = in.tokens.size(2);
    const int64_t first = in.protected_tokens;  // the class token, and a distilled model's second one
    const int64_t gone = schedule.remove[size_t(in.block)];  // resolved: never more than half of the patches
    const at::Tensor norms = in.tokens.narrow(1, first, tokens - first).norm(2, {2});
    const at::Tensor order = norms.argsort(/*stable=*/true, /*dim=*/1, /*descending=*/!largest_) + first;
    const at::Tensor kept = std::get<0>(order.narrow(1, 0, tokens - first - gone).sort(1));
    const at::Tensor src = order.narrow(1, tokens - first - gone, gone);

    const at::Tensor unit = in.tokens / in.tokens.norm(2, {2}, /*keepdim=*/true).clamp_min(1e-12);
    const auto rows = [&](const at::Tensor& index) {
      return unit.gather(1, index.unsqueeze(2).expand({-1, -1, channels}));
    };
    const at::Tensor likeness = rows(src).bmm(rows(kept).transpose(1, 2));  // cosines, [images, gone, kept]

    // Positions in `keep` are the block's output order: protected tokens first and in place.
    const at::Tensor protected_tokens = at::arange(first, at::kLong).expand({images, first});
    return {.keep = at::cat({protected_tokens, kept}, 1), .src = src, .dst = likeness.argmax(2) + first};
  }

 private:
  bool largest_;
};

}  // namespace

PYRA_MERGE_PLUGIN(Merger, "@name@", "0.1", "Merges the patch tokens of the smallest norm into their nearest")
)text";

constexpr const char* kPeft =
    R"text(// @name@: trains one vector a block, added to the output of the attention's projection.
#include <ATen/ATen.h>

#include "sdk/plugin.h"

using namespace pyra::sdk;

namespace {

class Method final : public PeftMethod {
 public:
  // What a recipe ([peft]) or --set peft.KEY=VALUE may choose, with its default. `plugins info @name@` shows it.
  static std::vector<Parameter> parameters() {
    return {{.name = "scale", .default_value = 1.0, .help = "factor on the vector", .minimum = 0.0}};
  }

  explicit Method(const Parameters& parameters) : scale_(parameters.number("scale")) {}

  // The trained tensors. pyra makes, trains, saves and restores them; zeros start from the model as it is.
  std::vector<TensorDecl> declare(const ModelShape& shape) const override {
    std::vector<TensorDecl> tensors;
    for (int64_t block = 0; block < shape.depth; ++block)
      tensors.push_back({.name = tensor_name({.block = block, .kind = LinearKind::proj}), .shape = {shape.embed_dim}});
    return tensors;
  }

  bool adapts(const LinearSite& site) const override { return site.kind == LinearKind::proj; }

  // The layer's new output by autograd operations: x [rows,in] went in, y [rows,out] came out.
  at::Tensor adapt(const LinearSite& site, const at::Tensor&, const at::Tensor& y,
                   const TensorMap& learned) const override {
    return y + learned.at(tensor_name(site)) * scale_;
  }

  // A vector added to the output is a bias, so `merge-lora` can write it into the model.
  bool mergeable() const override { return true; }
  LinearDelta delta(const LinearSite& site, const TensorMap& learned) const override {
    if (!adapts(site)) return {};
    return {.weight = {}, .bias = learned.at(tensor_name(site)) * scale_};
  }

 private:
  static std::string tensor_name(const LinearSite& site) { return site.name() + ".shift"; }
  double scale_;
};

}  // namespace

PYRA_PEFT_PLUGIN(Method, "@name@", "0.1", "A trained shift of the attention's output")
)text";

constexpr size_t kMaxName = 64;

void check_name(const std::string& kind, const std::string& name) {
  const std::vector<std::string> kinds{"merge", "peft"};
  if (kind != "merge" && kind != "peft")
    fail(ExitCode::usage, "no plugin kind '", kind, "'", did_you_mean(kind, kinds), " (there are: merge, peft)");
  const bool plain = !name.empty() && name.size() <= kMaxName && name[0] >= 'a' && name[0] <= 'z' &&
                     name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") == std::string::npos;
  if (!plain)
    fail(ExitCode::usage, "a plugin cannot be called '", name,
         "': expected lower-case letters, digits and _, a letter first, at most ", kMaxName);
}

std::string filled(std::string text, const std::map<std::string, std::string>& values) {
  for (const auto& [key, value] : values)
    for (size_t at = 0; (at = text.find(key, at)) != std::string::npos; at += value.size())
      text.replace(at, key.size(), value);
  return text;
}

}  // namespace

std::vector<std::filesystem::path> new_plugin(const std::string& kind, const std::string& name,
                                              const std::filesystem::path& folder) {
  check_name(kind, name);
  const bool merge = kind == "merge";
  const std::map<std::string, std::string> values{{"@name@", name}, {"@kind@", kind}};
  const std::vector<std::pair<std::filesystem::path, std::string>> files{
      {folder / "CMakeLists.txt", filled(kCMake, values)},
      {folder / (name + ".cpp"), filled(merge ? kMerge : kPeft, values)},
      {folder / "README.md", filled(filled(kReadme, {{"@use@", merge ? kMergeUse : kPeftUse}}), values)}};
  for (const auto& [path, text] : files)
    if (std::filesystem::exists(path))
      fail(ExitCode::usage, path.string(),
           " is already there and is not overwritten; choose another folder with --out");
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) fail(ExitCode::output, folder.string(), ": the folder cannot be made: ", error.message());
  std::vector<std::filesystem::path> written;
  for (const auto& [path, text] : files) {
    io::write_file(path, text);
    written.push_back(path);
  }
  return written;
}

}  // namespace pyra::tasks
