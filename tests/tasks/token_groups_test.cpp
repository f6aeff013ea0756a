#include "tasks/token_groups.h"

#include "goldens.h"
#include "io/io_support.h"
#include "pages.h"
#include "support.h"
#include "tasks/assemble.h"
#include "tasks/visualize.h"

using namespace pyra;
using tasks::kDropped;
using tasks::TokenGroups;
using tasks::TokenTrace;

namespace {

constexpr int64_t kImages = 5;

tasks::Model model_of(bool distilled) {
  const nn::VitConfig config{.arch = "tiny",
                             .image_size = 24,
                             .patch_size = 4,
                             .embed_dim = 32,
                             .depth = 4,
                             .num_heads = 2,
                             .mlp_dim = 64,
                             .num_classes = 3,
                             .distilled = distilled};
  tasks::Model model;
  model.file.config = config;
  model.file.preprocess.size = config.image_size;
  model.file.weights = nn::random_weights(config, 4);
  // As initialised, attention would look at everything alike.
  for (auto& [name, tensor] : model.file.weights)
    if (name.ends_with("qkv.weight")) tensor = tensor * 20;
  model.vit = std::make_unique<nn::Vit>(config, model.file.weights);
  return model;
}

/// As trained: PYRA's tensors have other values than at the start.
void attach(tasks::Model& model, const std::string& merger, const std::string& schedule) {
  tasks::attach_merge(model, test::built_plugins(), {.name = merger, .parameters = {}}, schedule, true, 1);
  uint64_t seed = 0;
  for (const auto& [name, tensor] : model.vit->merge()->learned) {
    const auto shape = tensor.sizes().vec();
    at::Tensor(tensor).copy_(nn::make_tensor({.name = name, .shape = shape, .init = sdk::Init::gaussian}, ++seed));
  }
  model.vit->weights_changed();
}

at::Tensor noise(const tasks::Model& model) {
  const int64_t size = model.file.config.image_size;
  return nn::make_tensor({.name = "images", .shape = {kImages, 3, size, size}, .init = sdk::Init::gaussian}, 9);
}

/// What the model itself says after each block in which `trace` has an entry: sizes [B,N'].
std::vector<at::Tensor> sizes_of(const tasks::Model& model, const at::Tensor& images, const TokenTrace& trace) {
  std::vector<at::Tensor> all, sizes;
  const at::Tensor logits = model.vit->forward(
      images, {.trace = [&](int64_t, const at::Tensor&, const at::Tensor& size) { all.push_back(size.clone()); }});
  CHECK(at::equal(logits, trace.logits));
  for (const TokenGroups& block : trace.images[0]) sizes.push_back(all[size_t(block.block)]);
  return sizes;
}

/// How many patches each token of a block holds, and how many none holds.
std::vector<int64_t> group_sizes(const TokenGroups& block, int64_t& dropped) {
  std::vector<int64_t> sizes(size_t(block.tokens), 0);
  dropped = 0;
  for (const int64_t token : block.token_of) {
    if (token == kDropped) {
      ++dropped;
      continue;
    }
    REQUIRE(token >= 0);
    REQUIRE(token < block.tokens);
    ++sizes[size_t(token)];
  }
  return sizes;
}

/// The groups of a block are those of an earlier one, put together or dropped: never torn apart.
void check_coarser(const TokenGroups& before, const TokenGroups& after) {
  std::map<int64_t, int64_t> went;
  for (size_t patch = 0; patch < after.token_of.size(); ++patch) {
    const auto [place, fresh] = went.emplace(before.token_of[patch], after.token_of[patch]);
    REQUIRE(place->second == after.token_of[patch]);
    if (before.token_of[patch] == kDropped) REQUIRE(after.token_of[patch] == kDropped);
  }
}

}  // namespace

TEST_CASE("groups of patches are as large as the model says its tokens are, after every block", "[visualize]") {
  const at::NoGradGuard no_gradients;
  const auto [merger, schedule, distilled] =
      GENERATE(table<std::string, std::string, bool>({{"tome", "5,4,0,3", false},
                                                      {"tome", "16,9,4,2", false},
                                                      {"tome", "6,6,6,6", true},
                                                      {"pyra", "5,4,3,2", false},
                                                      {"pyra", "high", false}}));
  CAPTURE(merger, schedule, distilled);
  tasks::Model model = model_of(distilled);
  attach(model, merger, schedule);
  const at::Tensor images = noise(model);
  const TokenTrace trace = tasks::trace_tokens(*model.vit, images);
  REQUIRE(trace.images.size() == size_t(kImages));
  const std::vector<at::Tensor> sizes = sizes_of(model, images, trace);
  const int64_t protected_tokens = model.file.config.protected_tokens();
  for (int64_t image = 0; image < kImages; ++image) {
    const auto& blocks = trace.images[size_t(image)];
    REQUIRE(blocks.size() == sizes.size());
    for (size_t b = 0; b < blocks.size(); ++b) {
      CAPTURE(image, blocks[b].block);
      CHECK(blocks[b].tokens == model.vit->tokens_after()[size_t(blocks[b].block)]);
      REQUIRE(blocks[b].token_of.size() == 36);
      int64_t dropped = 0;
      const std::vector<int64_t> groups = group_sizes(blocks[b], dropped);
      CHECK(dropped == 0);
      for (int64_t token = 0; token < blocks[b].tokens; ++token) {
        // A protected token counts itself, and no patch is in it.
        const int64_t expected = groups[size_t(token)] + (token < protected_tokens ? 1 : 0);
        REQUIRE(sizes[b][image][token].item<float>() == float(expected));
        if (token < protected_tokens) REQUIRE(groups[size_t(token)] == 0);
      }
      if (b > 0) check_coarser(blocks[b - 1], blocks[b]);
    }
  }
}

TEST_CASE("images of a batch are grouped each by itself", "[visualize]") {
  const at::NoGradGuard no_gradients;
  tasks::Model model = model_of(false);
  attach(model, "pyra", "6,5,4,3");
  const at::Tensor images = noise(model);
  const TokenTrace together = tasks::trace_tokens(*model.vit, images);
  CHECK(together.images[0].back().token_of != together.images[1].back().token_of);
  for (int64_t image = 0; image < kImages; ++image) {
    const TokenTrace alone = tasks::trace_tokens(*model.vit, images.narrow(0, image, 1));
    for (size_t b = 0; b < alone.images[0].size(); ++b)
      CHECK(alone.images[0][b].token_of == together.images[size_t(image)][b].token_of);
  }
}

TEST_CASE("what DiffRate drops is what is missing", "[visualize]") {
  const at::NoGradGuard no_gradients;
  tasks::Model model = model_of(false);
  const test::TempDir folder;
  // Pruned and merged, and in the last block neither.
  test::put(folder / "counts.toml", "prune = [37, 30, 22, 15]\nmerge = [33, 25, 15, 15]\n");
  attach(model, "diffrate", (folder / "counts.toml").string());
  const at::Tensor images = noise(model);
  const TokenTrace trace = tasks::trace_tokens(*model.vit, images);
  (void)sizes_of(model, images, trace);
  const std::vector<int64_t> tokens{33, 25, 15, 15};
  for (const auto& blocks : trace.images) {
    REQUIRE(blocks.size() == 4);  // it sorts its tokens in every block
    int64_t entering = 37, dropped_before = 0;
    for (size_t b = 0; b < 4; ++b) {
      int64_t dropped = 0;
      const std::vector<int64_t> groups = group_sizes(blocks[b], dropped);
      const int64_t pruned = entering - std::vector<int64_t>{37, 30, 22, 15}[b];
      CHECK(blocks[b].tokens == tokens[b]);
      CHECK(groups[0] == 0);
      // Every other token holds patches; each pruned token took at least its own with it.
      CHECK(std::count(groups.begin() + 1, groups.end(), 0) == 0);
      CHECK(dropped - dropped_before >= pruned);
      if (pruned == 0) CHECK(dropped == dropped_before);
      if (b > 0) check_coarser(blocks[b - 1], blocks[b]);
      entering = tokens[b];
      dropped_before = dropped;
    }
  }

  // Nothing merges: a patch a token, and all others are dropped.
  test::put(folder / "prune.toml", "prune = [30, 20, 10, 5]\nmerge = [30, 20, 10, 5]\n");
  attach(model, "diffrate", (folder / "prune.toml").string());
  for (const auto& blocks : tasks::trace_tokens(*model.vit, images).images) {
    for (const TokenGroups& block : blocks) {
      int64_t dropped = 0;
      const std::vector<int64_t> groups = group_sizes(block, dropped);
      CHECK(dropped == 36 - (block.tokens - 1));
      CHECK(*std::max_element(groups.begin(), groups.end()) == 1);
    }
  }
}

namespace {

std::string base64_decoded(std::string_view text) {
  constexpr std::string_view kLetters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  uint32_t word = 0;
  int bits = 0;
  for (const char letter : text) {
    if (letter == '=') break;
    word = word << 6 | uint32_t(kLetters.find(letter));
    bits += 6;
    if (bits >= 8) bytes += char(word >> (bits -= 8) & 255);
  }
  return bytes;
}

}  // namespace

TEST_CASE("a page shows the pixels, the groups and what was dropped", "[visualize]") {
  tasks::TokenPicture picture{.path = "<img src=x onerror=alert(1)>.png",
                              .label = "a & b",
                              .prediction = "\"c\"",
                              .model = "m",
                              .probability = 0.75,
                              .image = {8, 8, {}},
                              .patch_size = 4,
                              .protected_tokens = 1,
                              .blocks = {}};
  for (int i = 0; i < 8 * 8 * 3; ++i) picture.image.pixels.push_back(uint8_t(i));
  picture.blocks.push_back({.block = 2, .tokens = 3, .token_of = {1, 1, 2, kDropped}});
  picture.blocks.push_back({.block = 3, .tokens = 2, .token_of = {1, 1, 0, kDropped}});
  const std::string page = to_html(picture);
  CAPTURE(page);
  CHECK(test::page_fault(page).empty());
  CHECK(page.find("after block 2: 3 tokens, 1 patch dropped") != std::string::npos);
  CHECK(page.find("75.00 % (wrong)") != std::string::npos);
  CHECK(page.find("reference path on the CPU") != std::string::npos);
  CHECK(test::count_of(page, "<use ") == 3);
  // The upper two patches stand together, the left lower one alone and unpainted, the right lower one is grey.
  CHECK(test::count_of(page, "d=\"M0 0h1v1h-1zM1 0h1v1h-1z\"") == 2);
  CHECK(test::count_of(page, "d=\"M1 1h1v1h-1z\" fill=\"#7f7f7f\"") == 2);
  CHECK(test::count_of(page, "d=\"M0 1h1v1h-1z\"") == 1);  // in the second block: gone into the class token
  CHECK(page.find("merged into protected token 0: 1 patch<") != std::string::npos);
  CHECK(test::count_of(page, "d=\"M0 1h1M1 1v1M1 1h1\"") == 4);
  const std::string marker = "href=\"data:image/png;base64,";
  const size_t begin = page.find(marker) + marker.size();
  const std::string png = base64_decoded(std::string_view(page).substr(begin, page.find('"', begin) - begin));
  CHECK(data::decode({reinterpret_cast<const uint8_t*>(png.data()), png.size()}, "png").pixels == picture.image.pixels);
}
