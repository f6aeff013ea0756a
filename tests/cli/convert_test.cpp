#include "fixtures.h"
#include "io/pickle_writer.h"

using namespace pyra;
using namespace pyra::test;

namespace {

constexpr const char* kPth = PYRA_TEST_DATA "/pth/";

}  // namespace

TEST_CASE("convert makes a file that eval runs, of a .pth and of an .npz") {
  const Workshop shop;
  const auto converted = json_of(shop, cat("convert ", kPth, "vit_wrapped.pth --num-heads 2 --out m.safetensors"));
  CHECK(converted["source"] == "torch.save (zip), 'model'");
  CHECK(converted["num_classes"] == 5);
  CHECK(converted["image_size"] == 32);
  CHECK(json_of(shop, "inspect m.safetensors")["provenance"]["converted_from"] == "vit_wrapped.pth");
  const RunResult human =
      in(shop,
         cat("convert ", kPth, "vit_legacy.pth --num-heads 2 --out m.safetensors --set preprocess.mean=[0.1,0.2,0.3]"));
  CAPTURE(human.out, human.err);
  CHECK(human.exit_code == 0);
  for (const char* part : {"m.safetensors", "torch.save (legacy)", "5 classes", "mean 0.1 0.2 0.3", "dense"})
    CHECK(human.out.find(part) != std::string::npos);

  // Five classes where the task has six: the labels that fit still count, so a list without the sixth.
  std::string list;
  for (int label = 0; label < 5; ++label) list += cat("images/", label, ".ppm ", label, "\n");
  shop.copy_task("five");
  std::filesystem::remove(shop / "five/classes.txt");
  for (const char* name : {"train800.txt", "val200.txt", "train800val200.txt", "test.txt"})
    write_bytes(shop / cat("five/", name), list);
  const std::string npz = PYRA_TEST_DATA "/npz/augreg.npz";
  const auto inspected = json_of(shop, "inspect " + npz);
  CHECK(inspected["kind"] == "model");
  CHECK(inspected["num_heads"] == 2);
  CHECK(inspected["tensors"].size() == 40);
  json_of(shop, "convert " + npz + " --out n.safetensors");
  const auto direct = json_of(shop, "eval " + npz + " --data five --dtype fp32");
  CHECK(direct["images"] == 5);
  CHECK(direct["loss"] == json_of(shop, "eval n.safetensors --data five --dtype fp32")["loss"]);
  CHECK(json_of(shop, "eval m.safetensors --data five --dtype fp32")["loss"] > 0.0);
}

TEST_CASE("convert takes names that are no UTF-8, and a crop larger than the usual") {
  const Workshop shop;
  const RunResult odd = in(shop, "convert model.safetensors --out caf\xe9.safetensors --json");
  CAPTURE(odd.err);
  CHECK(odd.exit_code == 0);
  const auto crop = json_of(
      shop, cat("convert ", kPth, "vit_wrapped.pth --num-heads 2 --out m.safetensors --set preprocess.resize=crop"));
  CHECK(crop["preprocess"]["resize"] == "crop");
  CHECK(json_of(shop, "inspect m.safetensors")["image_size"] == 32);
  io::ModelFile large = Workshop::model_file();
  large.config.image_size = large.preprocess.size = 384;
  large.weights = nn::random_weights(large.config, 7);
  io::write_model(shop / "large.safetensors", large);
  json_of(shop, "convert large.safetensors --out cropped.safetensors --set preprocess.resize=crop");
  const nn::Preprocess preprocess = io::read_model(shop / "cropped.safetensors").preprocess;
  CHECK((preprocess.mode == nn::ResizeMode::crop && preprocess.size == 384 && preprocess.shorter == 438));
}

TEST_CASE("convert refuses in one line and writes nothing") {
  using namespace pickled;
  const Workshop shop;
  write_bytes(shop / "evil.pth", archive(proto(global("os", "system") + "(" + text("touch pwned") + "tR")));
  write_bytes(shop / "deep.pth", archive(proto(std::string(200'000, '('))));
  write_bytes(shop / "cut.pth", archive(proto(dict("w", tensor({})))).substr(0, 150));
  write_bytes(shop / "text.pth", "hello");
  for (const Refusal& refusal :
       std::vector<Refusal>{{"convert evil.pth --out m", 3, {"evil.pth", "'os.system'", "nothing was run"}},
                            {"convert deep.pth --out m", 3, {"deep.pth", "nested deeper"}},
                            {"convert cut.pth --out m", 3, {"cut.pth"}},
                            {"convert text.pth --out m", 3, {"text.pth"}},
                            {"convert none.pth --out m", 3, {"none.pth"}},
                            {"convert evil.pth", 2, {"--out is required"}},
                            {"convert evil.pth --out evil.pth", 2, {"is the file to read"}},
                            {"convert evil.pth --out no/m", 9, {"no/m"}},
                            {"convert evil.pth --out m --set train.lr=1", 2, {"train.lr"}},
                            {"convert evil.pth --out m --num-heads 0", 2, {"--num-heads"}},
                            {cat("convert ", kPth, "vit_zip.pth --out m"), 3, {"vit_zip.pth", "--num-heads"}},
                            {cat("convert ", kPth, "vit_zip.pth --num-heads 3 --out m"), 3, {"num_heads 3"}},
                            {cat("convert ", kPth, "pyra_trained.pth --out m"), 2, {"pyra_trained.pth", "--base"}},
                            {"convert model.safetensors --base model.safetensors --out m", 2, {"--base"}},
                            // Nothing else reads a pickle, and each says who does.
                            {"inspect evil.pth", 3, {"pyractl convert"}},
                            {cat("eval ", kPth, "vit_zip.pth --data task"), 3, {"pyractl convert"}},
                            {cat("eval ", kPth, "vit_legacy.pth --data task"), 3, {"pyractl convert"}}})
    check_refusal(shop, refusal);
  check_json_refusal(shop, "convert evil.pth --out m", 3);
}
