// Files of torch.save: those of the library itself (tests/data/pth/make.py), and hostile ones made here.
#include "io/torch_file.h"

#include <ATen/ATen.h>

#include <limits>

#include "io/io_support.h"
#include "io/model_file.h"
#include "io/named_tensors.h"
#include "io/pickle_writer.h"
#include "io/pyra_checkpoint.h"
#include "io/torch_state.h"
#include "nn/vit.h"
#include "support.h"

using namespace pyra;
using namespace pyra::io;
using test::check_error;
using namespace test::pickled;
namespace fs = std::filesystem;

namespace {

const fs::path kPthFiles = fs::path(PYRA_TEST_DATA) / "pth";

at::Tensor logits_of_file(const std::string& name, const at::Tensor& images) {
  const at::NoGradGuard no_gradients;
  const TorchCheckpoint read = read_torch_file(kPthFiles / name);
  const ModelFile model = timm_model(named_tensors(name, read.tensors, {}), {.image_size = {}, .num_heads = 2});
  return nn::Vit(model.config, model.weights).forward(images);
}

ModelFile model_of(const std::string& name) {
  return timm_model(named_tensors(name, read_torch_file(kPthFiles / name).tensors, {}),
                    {.image_size = {}, .num_heads = 2});
}

/// A file that must be refused with these words, and its name.
void refused_torch(const std::string& bytes, std::vector<std::string> words) {
  const test::TempDir dir;
  test::put(dir / "m.pth", bytes);
  words.push_back("m.pth");
  check_error(ExitCode::input, words, [&] { (void)read_torch_file(dir / "m.pth"); });
}

void refused_tensor(const Tensor& described, const std::vector<std::string>& words) {
  INFO(join(words));
  refused_torch(archive(proto(dict("w", tensor(described)))), words);
}

std::string legacy(const std::string& pickle, const std::string& keys, const std::string& data) {
  const std::string magic("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", 15);
  return magic + proto(integer(1001)) + proto(dict("little_endian", "\x88")) + pickle + keys + data;
}

}  // namespace

TEST_CASE("files of torch.save give timm's logits", "[torch]") {
  const SafetensorsFile expected(kPthFiles / "expected.safetensors");
  const at::Tensor images = expected.tensor("images");
  for (const auto& [file, logits] : std::vector<std::pair<std::string, std::string>>{{"vit_zip.pth", "vit"},
                                                                                     {"vit_legacy.pth", "vit"},
                                                                                     {"vit_wrapped.pth", "vit"},
                                                                                     {"vit_ema.pth", "vit"},
                                                                                     {"vit_views.pth", "vit"},
                                                                                     {"vit_dtypes.pth", "dtypes"},
                                                                                     {"deit_distilled.pth", "deit"},
                                                                                     {"mae_finetuned.pth", "mae"}}) {
    CAPTURE(file);
    CHECK(is_torch_file(kPthFiles / file));
    CHECK(test::max_difference(logits_of_file(file, images), expected.tensor(logits)) < 1e-5);
  }
  CHECK_FALSE(is_torch_file(kPthFiles / "expected.safetensors"));
  CHECK_FALSE(is_torch_file(kPthFiles / "make.py"));
  CHECK_FALSE(is_torch_file(kPthFiles));
  CHECK_FALSE(is_torch_file(kPthFiles / "../npz/augreg.npz"));
}

TEST_CASE("what a checkpoint says beside its tensors", "[torch]") {
  const TorchCheckpoint plain = read_torch_file(kPthFiles / "vit_zip.pth"),
                        legacy = read_torch_file(kPthFiles / "vit_legacy.pth"),
                        wrapped = read_torch_file(kPthFiles / "vit_wrapped.pth"),
                        averaged = read_torch_file(kPthFiles / "vit_ema.pth");
  CHECK(plain.container == "zip");
  CHECK(legacy.container == "legacy");
  CHECK(plain.key.empty());
  CHECK(wrapped.key == "model");
  CHECK(wrapped.arch == "deit_of_no_known_size");
  CHECK(averaged.key == "state_dict_ema");
  CHECK(averaged.arch == "vit_tiny");
  REQUIRE(plain.tensors.size() == legacy.tensors.size());
  for (const auto& [name, tensor] : plain.tensors) {
    CAPTURE(name);
    CHECK(at::equal(tensor, legacy.tensors.at(name)));
    CHECK(at::equal(tensor, wrapped.tensors.at("module." + name)));
  }
}

TEST_CASE("MAE's pretraining has no head, its fine-tuning pools by average; both want ImageNet's statistics",
          "[torch]") {
  const ModelFile pretraining = model_of("mae_pretraining.pth"), tuned = model_of("mae_finetuned.pth");
  CHECK(pretraining.config.num_classes == 0);
  CHECK(pretraining.config.pool == nn::Pool::token);
  CHECK(tuned.config.num_classes == 5);
  CHECK(tuned.config.pool == nn::Pool::avg);
  CHECK(pretraining.preprocess.mean[0] == 0.485f);
  CHECK(tuned.preprocess.mean[0] == 0.485f);
  CHECK(model_of("vit_zip.pth").preprocess.mean[0] == 0.5f);
}

TEST_CASE("a tensor that reaches out of its storage is refused", "[torch]") {
  const test::TempDir dir;
  test::put(dir / "good.pth", archive(proto(dict("w", tensor({.offset = 1, .size = {3}})))));
  CHECK(read_torch_file(dir / "good.pth").tensors.at("w").numel() == 3);

  constexpr int64_t kHuge = int64_t{1} << 62;
  refused_tensor({.offset = 1}, {"'w'", "reaches element 4 of a storage of 4"});
  refused_tensor({.offset = -1, .size = {1}}, {"'w'", "offset is -1"});
  refused_tensor({.offset = kHuge}, {"'w'"});
  refused_tensor({.offset = std::numeric_limits<int64_t>::max()}, {"'w'", "no size that can be held"});
  refused_tensor({.size = {2}, .stride = {-1}}, {"'w'", "stride is -1"});
  refused_tensor({.size = {-2}}, {"'w'", "size is -2"});
  refused_tensor({.size = {2, 3}, .stride = {2, 1}}, {"'w'", "reaches element 4"});
  refused_tensor({.size = {kHuge, 4}, .stride = {0, 0}}, {"'w'", "no size that can be held"});
  refused_tensor({.size = {3, 4}, .stride = {kHuge, 1}}, {"'w'", "no size that can be held"});
  refused_tensor({.size = {1000}, .stride = {0}}, {"'w'", "more than its storage of 4"});
  refused_tensor({.size = {4}, .stride = {1, 1}}, {"1 sizes and 2 strides"});
  refused_tensor({.size = std::vector<int64_t>(65, 1), .stride = std::vector<int64_t>(65, 1)}, {"'w'", "at most 64"});
}

TEST_CASE("storages are what they were declared to be", "[torch]") {
  refused_tensor({.elements = 5, .size = {5}}, {"'m/data/0' has 16 bytes", "5 x 4 = 20"});
  refused_tensor({.elements = 3, .size = {3}}, {"'m/data/0' has 16 bytes", "3 x 4 = 12"});
  refused_tensor({.key = "1"}, {"has no entry 'm/data/1'"});
  refused_tensor({.key = "../0"}, {"has no entry 'm/data/../0'"});
  refused_tensor({.elements = -4}, {"storage '0' has -4 elements"});
  refused_tensor({.elements = std::numeric_limits<int64_t>::max()}, {"storage '0'"});
  refused_tensor({.storage = "OddStorage"}, {"'torch.OddStorage'"});
  refused_tensor({.storage = "Size"}, {"of type 'torch.Size'"});
  const std::string two = "}(" + text("a") + tensor({}) + text("b") + tensor({.storage = "IntStorage"}) + "u";
  refused_torch(archive(proto(two)), {"storage '0' is described in two ways"});

  // One honest storage under many names: together they are a bomb.
  std::string shared = "}(" + text("w") + tensor({.elements = 4000, .size = {4000}}) + "q\x01";
  for (int i = 0; i < 200; ++i) shared += text(cat(i)) + "h\x01";
  refused_torch(archive(proto(shared + "u"), std::string(16000, 'x')), {"share their storages over and over"});
}

TEST_CASE("what was saved has to be a dict of tensors", "[torch]") {
  refused_torch(archive(proto("N")), {"no dict of tensors"});
  refused_torch(archive(proto("]")), {"no dict of tensors"});
  refused_torch(archive(proto("}")), {"no tensors in it"});
  refused_torch(archive(proto(dict("model", "}"))), {"no tensors in 'model'"});
  refused_torch(archive(proto("}K\x01Ns")), {"a key that is no text"});
  refused_torch(archive(proto(dict("w", "K\x01Q"))), {"no storage of torch.save's"});
  refused_torch(archive(proto(dict("w", global("torch._utils", "_rebuild_tensor_v2") + ")R"))), {"0 arguments"});
  refused_torch(archive(proto(dict("w", global("torch._utils", "_rebuild_tensor_v3") + ")R"))),
                {"_rebuild_tensor_v3'"});
  refused_torch(archive(proto(global("os", "system") + "(" + text("true") + "tR")), {"m/data.pkl", "'os.system'"});
  const test::TempDir dir;
  const std::string both = "}(" + text("epoch") + "K\x03" + text("w") + tensor({}) + "u";
  test::put(dir / "m.pth", archive(proto(both)));
  CHECK(read_torch_file(dir / "m.pth").tensors.size() == 1);
}

TEST_CASE("broken and hostile archives are refused", "[torch]") {
  const std::string pickle = proto(dict("w", tensor({})));
  const std::string sixteen(16, '\0');
  refused_torch(test::zip_bytes({{.name = "m/version", .bytes = "3"}}), {"without a data.pkl"});
  refused_torch(test::zip_bytes({{.name = "m/data.pkl", .bytes = pickle}, {.name = "n/data.pkl", .bytes = pickle}}),
                {"two pickles"});
  refused_torch(test::zip_bytes({{.name = "m/data.pkl", .bytes = pickle}, {.name = "m/data.pkl", .bytes = pickle}}),
                {"twice"});
  refused_torch(test::zip_bytes({{.name = "m/data.pkl", .bytes = pickle}, {.name = "m/byteorder", .bytes = "big"}}),
                {"not little-endian"});
  refused_torch(test::zip_bytes({{.name = "m/data.pkl", .bytes = pickle},
                                 {.name = "m/data/0", .bytes = sixteen, .stated_size = 0x7fffffff}}),
                {"m/data/0", "zip bomb"});
  refused_torch(test::zip_bytes({{.name = "m/data.pkl", .bytes = pickle},
                                 {.name = "m/data/0", .bytes = sixteen, .bad_checksum = true}}),
                {"m/data/0", "CRC"});
  refused_torch(test::zip_bytes({{.name = "m/data.pkl", .bytes = pickle},
                                 {.name = "m/data/0", .bytes = sixteen, .directory_size = 20}}),
                {"Inconsistent"});
  refused_torch(test::zip_bytes({{.name = "m/data.pkl", .bytes = pickle, .flags = 1}}), {"m/data.pkl"});
  const std::string whole = archive(pickle);
  for (size_t length = 4; length < whole.size(); ++length) {
    CAPTURE(length);
    const test::TempDir dir;
    test::put(dir / "m.pth", whole.substr(0, length));
    const auto error = test::error_of([&] { (void)read_torch_file(dir / "m.pth"); });
    // Without some of the end record's last bytes, libarchive still finds the directory; then all is there.
    if (length < whole.size() - 22) REQUIRE(error);
    if (error) CHECK(error->code() == ExitCode::input);
  }
}

TEST_CASE("the format before torch 1.6 is checked as well", "[torch]") {
  const std::string pickle = proto(dict("w", tensor({}))), keys = proto("](" + text("0") + "e");
  const std::string data = test::little(4, 8) + std::string(16, '\0');
  const test::TempDir dir;
  test::put(dir / "good.pth", legacy(pickle, keys, data));
  CHECK(read_torch_file(dir / "good.pth").tensors.at("w").numel() == 4);
  CHECK(is_torch_file(dir / "good.pth"));

  refused_torch(legacy(pickle, keys, test::little(5, 8) + std::string(16, '\0')), {"has 5 elements, declared are 4"});
  refused_torch(legacy(pickle, keys, test::little(4, 8) + std::string(15, '\0')), {"beyond the end of the file"});
  refused_torch(legacy(pickle, keys, ""), {"beyond the end of the file"});
  refused_torch(legacy(pickle, proto("]"), data), {"lists 0 storages"});
  refused_torch(legacy(pickle, proto("](" + text("1") + "e"), data), {"names '1'"});
  refused_torch(legacy(pickle, proto("](" + text("0") + text("0") + "e"), data), {"names '0'"});
  refused_torch(legacy(proto(global("os", "system") + ")R"), keys, data), {"'os.system'"});
  const std::string whole = legacy(pickle, keys, data);
  refused_torch(whole.substr(0, 40), {"cut"});
  std::string foreign = whole;
  foreign[foreign.find('\x88')] = '\x89';
  refused_torch(foreign, {"not little-endian"});
}

TEST_CASE("checkpoints of PYRA's authors: schedule, names, merged LoRA", "[torch]") {
  const SafetensorsFile golden(test::golden("vit_pyra_lora.safetensors"));
  ModelFile base;
  for (const auto& [name, tensor] : golden.tensors())
    if (name.starts_with("model.")) base.weights.emplace(name.substr(6), tensor);
  base = timm_model(named_tensors("base", base.weights, {}), {.image_size = {}, .num_heads = 4});
  const NamedTensors trained = named_tensors("p.pth", read_torch_file(kPthFiles / "pyra_trained.pth").tensors, {});
  CHECK(is_pyra_checkpoint(trained));
  const ModelFile model = pyra_checkpoint_model(trained, &base);
  REQUIRE(model.merge);
  CHECK(model.merge->name == "pyra");
  CHECK(model.merge->schedule.remove == std::vector<int64_t>{16, 8, 4, 2});
  CHECK(model.merge->schedule.text == "16,8,4,2");
  CHECK(model.merge->learned.size() == 16);
  CHECK(at::equal(model.merge->learned.at("blocks.1.norm.bias"), golden.tensor("peft.blocks.1.pyra_norm.bias")));
  const at::Tensor merged = golden.tensor("model.blocks.2.attn.qkv.weight") +
                            at::mm(golden.tensor("peft.blocks.2.lora_b"), golden.tensor("peft.blocks.2.lora_a"));
  CHECK(test::max_difference(model.weights.at("blocks.2.attn.qkv.weight"), merged) < 1e-6);
  CHECK(model.preprocess.mean[0] == 0.485f);

  const auto changed = [&](const std::string& name, const at::Tensor& tensor) {
    sdk::TensorMap tensors = read_torch_file(kPthFiles / "pyra_trained.pth").tensors;
    tensors.erase(name);
    if (tensor.defined()) tensors.emplace(name, tensor);
    return named_tensors("p.pth", tensors, {});
  };
  const auto refused = [&](ExitCode code, const std::vector<std::string>& words, const NamedTensors& named) {
    check_error(code, words, [&] { (void)pyra_checkpoint_model(named, &base); });
  };
  check_error(ExitCode::usage, {"p.pth", "--base"}, [&] { (void)pyra_checkpoint_model(trained, nullptr); });
  refused(ExitCode::input, {"blocks.1.pyra_b", "missing"}, changed("blocks.1.pyra_b", {}));
  refused(ExitCode::input, {"blocks.1.pyra_a", "missing"}, changed("blocks.1.pyra_a", {}));
  refused(ExitCode::input, {"LoRA_b", "one is missing"}, changed("blocks.1.attn.LoRA_b.weight", {}));
  refused(ExitCode::input, {"ranks 4 and 3"}, changed("blocks.1.attn.LoRA_b.weight", at::zeros({192, 3})));
  refused(ExitCode::input, {"'blocks.1.pyra_a' has shape [8, 2]"}, changed("blocks.1.pyra_a", at::zeros({8, 2})));
  refused(ExitCode::input, {"'blocks.1.pyra_a' has 40 rows, but at most 24"},
          changed("blocks.1.pyra_a", at::zeros({40, 1})));
  refused(ExitCode::input, {"'blocks.4.pyra_a' belongs to none"}, changed("blocks.4.pyra_a", at::zeros({8, 1})));
  refused(ExitCode::input, {"'surplus'", "--base"}, changed("surplus", at::zeros({8, 1})));
  refused(ExitCode::input, {"'norm.weight' has shape [32]"}, changed("norm.weight", at::zeros({32})));
  ModelFile merging = base;
  merging.merge = model.merge;
  check_error(ExitCode::usage, {"merges tokens"}, [&] { (void)pyra_checkpoint_model(trained, &merging); });
}
