// Families that differ from the plain ViT: LayerScale, register tokens, positions of patches alone, against what timm
// wrote and computed (tests/data/timm/make.py).
#include "io/timm_model.h"

#include "io/hf_model.h"
#include "io/io_support.h"
#include "io/safetensors.h"
#include "io/timm_folder.h"
#include "nn/vit.h"
#include "support.h"

using namespace pyra;
using namespace pyra::io;
using test::check_error;
namespace fs = std::filesystem;

namespace {

const fs::path kTimmFiles = fs::path(PYRA_TEST_DATA) / "timm";

struct Family {
  const char* name;
  int64_t registers;
  bool layer_scale, no_embed_class;
};

const Family kFamilies[] = {{"dinov2", 0, true, false},
                            {"dinov2_reg", 4, true, true},
                            {"registers", 3, false, false},
                            {"deit3", 0, true, true}};

ModelFile read(const Family& family) {
  return read_model(kTimmFiles / cat(family.name, ".safetensors"));
}

double difference(const Family& family, const ModelFile& model) {
  const SafetensorsFile expected(kTimmFiles / cat(family.name, "_expected.safetensors"));
  const at::NoGradGuard no_gradients;
  const at::Tensor logits = nn::Vit(model.config, model.weights).forward(expected.tensor("images"));
  return test::max_difference(logits, expected.tensor("logits"));
}

}  // namespace

TEST_CASE("families with LayerScale, registers and positions of patches alone give timm's logits", "[timm]") {
  for (const Family& family : kFamilies) {
    CAPTURE(family.name);
    const ModelFile model = read(family);
    CHECK(model.config.registers == family.registers);
    CHECK(model.config.layer_scale == family.layer_scale);
    CHECK(model.config.no_embed_class == family.no_embed_class);
    CHECK(model.config.image_size == 32);
    CHECK(model.config.tokens() == 17 + family.registers);
    CHECK(difference(family, model) < 1e-5);
  }
}

TEST_CASE("a folder of timm's on the hub says what its tensors do not", "[timm]") {
  const fs::path hub = kTimmFiles / "hub";
  REQUIRE(is_timm_folder(hub));
  const ModelFile model = read_model(hub);
  CHECK(model.config.num_heads == 2);  // 64 channels a head would be none
  CHECK(model.preprocess.mean == kImageNetMean);
  CHECK(model.preprocess.std == kImageNetStd);
  CHECK(model.class_names == std::vector<std::string>{"a", "b", "c"});
  const SafetensorsFile expected(kTimmFiles / "hub_expected.safetensors");
  const at::NoGradGuard no_gradients;
  const at::Tensor logits = nn::Vit(model.config, model.weights).forward(expected.tensor("images"));
  CHECK(test::max_difference(logits, expected.tensor("logits")) < 1e-5);
  CHECK(read_model(hub, {.image_size = 64}).config.tokens() == 65);

  const test::TempDir dir;
  fs::copy(hub, dir / "copy");
  const auto with_config = [&](const std::string& text) { test::put(dir / "copy/config.json", text); };
  const auto read_copy = [&] { (void)read_model(dir / "copy"); };
  // As folders were in 2022.
  with_config(R"({"architecture": "vit_tiny_patch16_224", "num_classes": 3, "mean": [0.1, 0.2, 0.3],
                  "model_args": {"num_heads": 2}})");
  CHECK(read_model(dir / "copy").preprocess.mean == std::array<float, 3>{0.1f, 0.2f, 0.3f});
  with_config(R"({"architecture": 5})");
  check_error(ExitCode::input, {"config.json", "architecture", "an integer"}, read_copy);
  with_config(R"({"architecture": "vit", "mean": [0.1, 0.2], "model_args": {"num_heads": 2}})");
  check_error(ExitCode::input, {"mean", "[0.1,0.2]"}, read_copy);
  with_config(R"({"architecture": "vit", "label_names": ["a"], "model_args": {"num_heads": 2}})");
  check_error(ExitCode::input, {"class_names", "3 names"}, read_copy);
  with_config(R"({"architecture": "vit", "model_args": {"num_heads": 5}})");
  check_error(ExitCode::input, {"5"}, read_copy);
  fs::rename(dir / "copy/model.safetensors", dir / "copy/pytorch_model.bin");
  check_error(ExitCode::input, {"no model.safetensors", "pyractl convert", "pytorch_model.bin"}, read_copy);
}

TEST_CASE("a name of nothing but wrappers is refused, and soon", "[timm]") {
  const test::TempDir dir;
  std::string name;
  for (int i = 0; i < 500'000; ++i) name += "module.";
  write_safetensors(dir / "m.safetensors", {{name, at::zeros({1})}});
  check_error(ExitCode::input, {"m.safetensors"}, [&] { (void)read_model(dir / "m.safetensors"); });
}

TEST_CASE("such families are the same models after our own file and after timm's", "[timm]") {
  const test::TempDir dir;
  for (const Family& family : kFamilies) {
    CAPTURE(family.name);
    ModelFile model = read(family);
    write_model(dir / "ours", model);
    const ModelFile ours = read_model(dir / "ours");
    CHECK(ours.config == model.config);
    CHECK(difference(family, ours) < 1e-5);
    write_model(dir / "timm", model, ModelFormat::timm);
    // timm loads strictly: the same names and shapes as it wrote itself, DeiT-III's two scales by timm's names.
    const SafetensorsFile before(kTimmFiles / cat(family.name, ".safetensors")), after(dir / "timm");
    CHECK(after.entries().size() == before.entries().size());
    for (const auto& [name, entry] : after.entries()) {
      std::string there = name;
      if (std::string_view(family.name) == "deit3")
        for (const char branch : {'1', '2'})
          if (const auto at = there.find(cat("ls", branch, ".gamma")); at != there.npos)
            there = cat(there.substr(0, at), "gamma_", branch);
      CAPTURE(name);
      REQUIRE(before.contains(there));
      CHECK(before.entries().find(there)->second.shape == entry.shape);
    }
    CHECK(difference(family, read_model(dir / "timm")) < 1e-5);
  }
}

TEST_CASE("another resolution resizes the grid and leaves registers alone", "[timm]") {
  for (const Family& family : kFamilies) {
    CAPTURE(family.name);
    const ModelFile model = read_model(kTimmFiles / cat(family.name, ".safetensors"), {.image_size = 48});
    CHECK(model.config.tokens() == 37 + family.registers);
    CHECK_NOTHROW(nn::Vit(model.config, model.weights));
  }
}

TEST_CASE("a Hugging Face folder takes what it can say", "[timm]") {
  const test::TempDir dir;
  write_model(dir / "deit3", read(kFamilies[3]), ModelFormat::hf);
  CHECK(difference(kFamilies[3], read_model(dir / "deit3")) < 1e-5);
  check_error(ExitCode::usage, {"register tokens"},
              [&] { write_model(dir / "registers", read(kFamilies[2]), ModelFormat::hf); });
}
