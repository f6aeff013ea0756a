// Families that differ from the plain ViT: LayerScale, register tokens, positions of patches alone, against what timm
// wrote and computed (tests/data/timm/make.py).
#include "io/timm_model.h"

#include "io/hf_model.h"
#include "io/io_support.h"
#include "io/safetensors.h"
#include "nn/vit.h"
#include "support.h"

using namespace pyra;
using namespace pyra::io;
using test::check_error;
namespace fs = std::filesystem;

namespace {

const fs::path kFixtures = fs::path(PYRA_TEST_DATA) / "timm";

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
  return read_model(kFixtures / cat(family.name, ".safetensors"));
}

double difference(const Family& family, const ModelFile& model) {
  const SafetensorsFile expected(kFixtures / cat(family.name, "_expected.safetensors"));
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
    const SafetensorsFile before(kFixtures / cat(family.name, ".safetensors")), after(dir / "timm");
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
    const ModelFile model = read_model(kFixtures / cat(family.name, ".safetensors"), {.image_size = 48});
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
