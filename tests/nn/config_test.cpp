#include "nn/config.h"

#include <fstream>
#include <numeric>

#include "base/error.h"
#include "io/io_support.h"
#include "support.h"

using namespace pyra;
using namespace pyra::nn;

namespace {

std::vector<int64_t> after(const VitConfig& config, const std::vector<int64_t>& remove) {
  std::vector<int64_t> counts;
  int64_t tokens = config.tokens();
  for (int64_t r : remove) counts.push_back(tokens -= std::min(r, (tokens - config.protected_tokens()) / 2));
  return counts;
}

}  // namespace

TEST_CASE("architectures have the published parameter counts", "[nn]") {
  const auto parameters = [](const std::string& arch) {
    int64_t total = 0;
    for (const TensorShape& tensor : tensor_shapes(arch_config(arch)))
      total += std::accumulate(tensor.shape.begin(), tensor.shape.end(), int64_t{1}, std::multiplies<>());
    return total;
  };
  // timm 1.0: sum(p.numel() for p in create_model(name).parameters())
  CHECK(parameters("vit_tiny_patch16_224") == 5717416);
  CHECK(parameters("vit_small_patch16_224") == 22050664);
  CHECK(parameters("vit_base_patch16_224") == 86567656);
  CHECK(parameters("vit_large_patch16_224") == 304326632);
  CHECK(parameters("vit_huge_patch14_224") == 632045800);
  CHECK(parameters("deit_base_distilled_patch16_224") == 87338192);
  // LayerScale's two vectors a block are multiplied into the layers before them.
  const auto scaled = [&](const std::string& arch) {
    const VitConfig config = arch_config(arch);
    return parameters(arch) + (config.layer_scale ? 2 * config.depth * config.embed_dim : 0);
  };
  CHECK(scaled("vit_small_patch14_dinov2") == 22441192);
  CHECK(scaled("vit_base_patch14_reg4_dinov2") == 87351016);
  CHECK(scaled("deit3_base_patch16_224") == 86585320);
}

TEST_CASE("MACs of the published schedules have the published ratios to dense", "[nn]") {
  const auto ratio = [](const std::string& arch, const std::string& schedule) {
    const VitConfig config = arch_config(arch);
    const auto counts = after(config, parse_schedule(schedule, config).remove);
    return double(count_macs(config, counts)) / double(count_macs(config));
  };
  CHECK(ratio("vit_base_patch16_224", "low") == Approx(0.499).margin(0.001));
  CHECK(ratio("vit_large_patch16_224", "low") == Approx(0.503).margin(0.001));
  CHECK(ratio("vit_base_patch16_224", "high") == Approx(0.289).margin(0.001));
  CHECK(ratio("vit_large_patch16_224", "high") == Approx(0.291).margin(0.001));
}

TEST_CASE("schedules are read in every form users write", "[nn]") {
  const VitConfig config = arch_config("vit_base_patch16_224");
  CHECK(parse_schedule("high", config).remove == std::vector<int64_t>{40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3});
  CHECK(parse_schedule("low", config).remove == std::vector<int64_t>{16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 10});
  CHECK(parse_schedule("low", arch_config("deit_base_distilled_patch16_224")).remove ==
        std::vector<int64_t>{16, 16, 16, 16, 16, 16, 10, 10, 10, 10, 10, 10});
  CHECK(parse_schedule("13", config).remove == std::vector<int64_t>(12, 13));
  CHECK(parse_schedule("13@0", config).remove == std::vector<int64_t>(12, 13));
  const auto rising = parse_schedule("8@1", config).remove;
  CHECK((rising.front() == 0 && rising.back() == 16));
  const auto falling = parse_schedule("8@-1", config).remove;
  CHECK((falling.front() == 16 && falling.back() == 0));
  CHECK(parse_schedule("16,8,4", config).remove == std::vector<int64_t>{16, 8, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0});
  CHECK(parse_schedule("dense", config).remove == std::vector<int64_t>(12, 0));
}

TEST_CASE("named schedules keep their shape at other depths and resolutions", "[nn]") {
  const auto arch = GENERATE("vit_base_patch16_384", "vit_huge_patch14_224", "vit_base_patch32_224");
  const VitConfig config = arch_config(arch);
  CAPTURE(arch);
  const auto remove = parse_schedule("high", config).remove;
  REQUIRE(int64_t(remove.size()) == config.depth);
  const double gone = double(std::accumulate(remove.begin(), remove.end(), int64_t{0})) / double(config.patches());
  CHECK(gone == Approx(192.0 / 196).margin(0.02));
  const auto counts = after(config, remove);
  const double ratio = double(count_macs(config, counts)) / double(count_macs(config));
  CHECK((ratio > 0.2 && ratio < 0.4));
}

TEST_CASE("schedule files give removed or kept counts", "[nn]") {
  const test::TempDir folder;
  const VitConfig config = arch_config("vit_tiny_patch16_224");
  const auto write = [&](const std::string& name, const std::string& text) {
    std::ofstream(folder / name) << text;
    return (folder / name).string();
  };
  CHECK(parse_schedule(write("a.toml", "remove = [16, 8]"), config).remove[1] == 8);
  const std::string kept = "[197,190,180,170,160,150,140,130,120,110,100,90]";
  const auto counts = parse_schedule(write("b.toml", "prune = " + kept + "\nmerge = " + kept), config);
  CHECK((counts.remove.empty() && counts.prune == counts.merge && counts.merge.back() == 90));
  const auto published = write(
      "c.json", R"({"vit_tiny": {"0.6": {"prune_kept_num": ")" + kept + R"(", "merge_kept_num": ")" + kept + R"("}}})");
  CHECK(parse_schedule(published, config).merge == counts.merge);
  CHECK(parse_schedule(published + "#vit_tiny/0.6", config).merge == counts.merge);

  const auto message = [&](const std::string& text) {
    return test::message_of([&] { (void)parse_schedule(text, config); }, ExitCode::usage);
  };
  CHECK(message(write("d.toml", "\nremoves = [1]")).find("d.toml:2: removes is not a key; did you mean 'remove'?") !=
        std::string::npos);
  CHECK(message(write("e.toml", "remove = [1,2,3,4,5,6,7,8,9,10,11,12,13]")).find("13 entries, the model has 12") !=
        std::string::npos);
  CHECK(message(published + "#vit_tiny/0.7").find("vit_tiny/0.6") != std::string::npos);
  CHECK(message((folder / "none.toml").string()).find("none.toml") != std::string::npos);
  CHECK(message("hgih").find("'hgih'") != std::string::npos);
  CHECK(message("8@2").find("outside -1 to 1") != std::string::npos);
  CHECK(message("-3").find("-3") != std::string::npos);
}

TEST_CASE("an unknown architecture names the nearest", "[nn]") {
  CHECK(test::message_of([] { (void)arch_config("vit_bse_patch16_224"); }, ExitCode::usage)
            .find("'vit_base_patch16_224'") != std::string::npos);
  // A file may say anything: no stack is deep enough for a matcher that recurses.
  CHECK(test::message_of([] { (void)arch_config("vit_" + std::string(1'000'000, 'a')); }, ExitCode::usage).size() <
        1000);
  CHECK(test::message_of([] { (void)arch_config("vit_base_patch0_224"); }, ExitCode::input).find("patch_size is 0") !=
        std::string::npos);
}
