#include "io/model_file.h"

#include <ATen/ATen.h>

#include <nlohmann/json.hpp>

#include "base/philox.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "io_support.h"
#include "support.h"

namespace pyra::io {
namespace {

using nlohmann::json;
using test::check_error;
using test::golden;
namespace fs = std::filesystem;

/// The model in a golden file: its "model." tensors and the config that its metadata describes.
ModelFile golden_model(const std::string& name) {
  const SafetensorsFile file(golden(name));
  const json config = json::parse(file.metadata().at("describe")).at("config");
  ModelFile model;
  for (const auto& [key, tensor] : file.tensors()) {
    if (key.starts_with("model.")) model.weights.emplace(key.substr(6), tensor);
  }
  model.config = {.arch = "tiny test model",
                  .image_size = config.at("img_size"),
                  .patch_size = config.at("patch_size"),
                  .embed_dim = config.at("embed_dim"),
                  .depth = config.at("depth"),
                  .num_heads = config.at("num_heads"),
                  .mlp_dim = model.weights.at("blocks.0.mlp.fc1.weight").size(0),
                  .num_classes = config.at("num_classes"),
                  .pool = model.weights.contains("fc_norm.weight") ? nn::Pool::avg : nn::Pool::token,
                  .distilled = model.weights.contains("dist_token"),
                  .norm_eps = config.at("eps")};
  model.preprocess.size = model.config.image_size;
  return model;
}

/// The same model with everything that a file can carry.
ModelFile full_model() {
  ModelFile model = golden_model("vit_dense.safetensors");
  model.preprocess = {.size = 32,
                      .mode = nn::ResizeMode::crop,
                      .shorter = 36,
                      .mean = {0.485f, 0.456f, 0.406f},
                      .std = {0.229f, 0.224f, 0.225f}};
  model.class_names = {"cat", "dog \"quoted\"", "", "Ünïcode", "line\nbreak"};
  model.merge = MergeSpec{.name = "pyra",
                          .schedule = {.text = "high", .remove = {16, 8, 4, 2}, .prune = {}, .merge = {}},
                          .parameters = {{"flag", true},
                                         {"count", int64_t{1} << 60},
                                         {"ratio", 0.1},
                                         {"whole", 2.0},
                                         {"word", "x"},
                                         {"list", std::vector<std::string>{"q", "v"}}},
                          .proportional_attention = false,
                          .learned = {{"blocks.0.a", at::randn({16, 1})}, {"blocks.0.b", at::zeros({1, 64})}}};
  model.provenance = {{"protocol", "vtab"}, {"command", "pyractl finetune --recipe \"a b.toml\""}};
  return model;
}

void check_equal(const sdk::TensorMap& got, const sdk::TensorMap& expected) {
  REQUIRE(got.size() == expected.size());
  for (const auto& [name, tensor] : expected) {
    INFO(name);
    REQUIRE(got.contains(name));
    CHECK(got.at(name).scalar_type() == at::kFloat);
    CHECK(test::max_difference(got.at(name), tensor) == 0);
  }
}

/// Writes `model`'s weights under timm's names with this metadata.
void write_timm(const fs::path& path, const ModelFile& model, const Metadata& metadata = {{"num_heads", "4"}}) {
  write_safetensors(path, model.weights, metadata);
}

/// full_model() written, with its metadata changed at `pointer`.
void write_changed(const fs::path& path, const std::string& pointer, const json& value) {
  write_model(path, full_model());
  const SafetensorsFile file(path);
  json metadata = json::parse(file.metadata().at("pyra"));
  metadata[json::json_pointer(pointer)] = value;
  write_safetensors(path, file.tensors(), {{"pyra", metadata.dump()}});
}

}  // namespace

TEST_CASE("what a model is made from says of itself is told as the other's") {
  ModelFile model;
  model.provenance = {{"accuracy", "0.9"}, {"base", "first"}, {"base_epochs", "300"}};
  begin_provenance(model, "base", "models/second.safetensors");
  CHECK(model.provenance == std::map<std::string, std::string>{
                                {"base", "second.safetensors"}, {"base_accuracy", "0.9"}, {"base_base", "first"}});
  begin_provenance(model, "base", "models/third/");
  CHECK(model.provenance == std::map<std::string, std::string>{{"base", "third"}, {"base_base", "second.safetensors"}});
}

TEST_CASE("a model survives its file: config, preprocessing, classes, merge, weights, provenance") {
  const test::TempDir dir;
  const ModelFile model = full_model();
  write_model(dir / "m", model);
  const ModelFile got = read_model(dir / "m");
  CHECK(got.config == model.config);
  CHECK(got.preprocess == model.preprocess);
  CHECK(got.class_names == model.class_names);
  CHECK(got.provenance == model.provenance);
  REQUIRE(got.merge);
  CHECK(got.merge->name == "pyra");
  CHECK(got.merge->schedule == model.merge->schedule);
  CHECK((got.merge->parameters == model.merge->parameters));
  CHECK(got.merge->proportional_attention == false);
  check_equal(got.weights, model.weights);
  check_equal(got.merge->learned, model.merge->learned);

  write_model(dir / "again", got);
  CHECK(test::get(dir / "again") == test::get(dir / "m"));
  CHECK(SafetensorsFile(dir / "m").metadata().at("format") == "pt");
}

TEST_CASE("a timm file tells its config by names and shapes") {
  const test::TempDir dir;
  const std::string name =
      GENERATE("vit_dense.safetensors", "deit_distilled_dense.safetensors", "mae_pool_tome.safetensors");
  INFO(name);
  ModelFile model = golden_model(name);
  write_timm(dir / "m", model);
  const ModelFile got = read_model(dir / "m");
  model.config.arch = "";
  CHECK(got.config == model.config);
  CHECK_FALSE(got.merge);
  CHECK(got.class_names.empty());
  check_equal(got.weights, model.weights);
  const bool imagenet = name != "vit_dense.safetensors";
  CHECK(got.preprocess.mean[0] == (imagenet ? 0.485f : 0.5f));
  CHECK(got.preprocess.size == model.config.image_size);
}

TEST_CASE("half-precision and double weights become fp32") {
  const test::TempDir dir;
  const ModelFile model = golden_model("vit_dense.safetensors");
  const auto dtype = GENERATE(at::kHalf, at::kBFloat16, at::kDouble);
  ModelFile stored = model, expected = model;
  for (auto& [name, tensor] : stored.weights) tensor = tensor.to(dtype);
  for (auto& [name, tensor] : expected.weights) tensor = tensor.to(dtype).to(at::kFloat);
  write_timm(dir / "m", stored);
  check_equal(read_model(dir / "m").weights, expected.weights);
}

TEST_CASE("a timm file's metadata: normalisation, class names, heads, and the rest as provenance") {
  const test::TempDir dir;
  const ModelFile model = golden_model("vit_dense.safetensors");
  const auto read = [&](Metadata metadata) {
    metadata.emplace("num_heads", "4");
    write_timm(dir / "m", model, metadata);
    return read_model(dir / "m");
  };
  CHECK(read({{"mean", "0.25"}}).preprocess.mean == std::array{0.25f, 0.25f, 0.25f});
  CHECK(read({{"std", "[0.229, 0.224,0.225]"}}).preprocess.std == std::array{0.229f, 0.224f, 0.225f});
  CHECK(read({{"mean", "0.485 0.456 0.406"}}).preprocess.mean == std::array{0.485f, 0.456f, 0.406f});
  CHECK(read({{"class_names", R"(["a","b","c","d","e"])"}}).class_names.at(4) == "e");
  CHECK(read({{"epochs", "58.5"}}).provenance == std::map<std::string, std::string>{{"epochs", "58.5"}});
  CHECK(read({{"architecture", "something_else"}}).config.arch == "something_else");

  const auto refused = [&](const std::string& key, const std::string& value, const std::string& words) {
    INFO(key << " = " << value);
    check_error(ExitCode::input, {(dir / "m").string(), "'" + key + "'", words}, [&] { (void)read({{key, value}}); });
  };
  refused("mean", "", "expected one or three");
  refused("mean", "0.5, 0.5", "expected one or three");
  refused("mean", "half", "expected one or three");
  refused("mean", "nan", "expected one or three");
  refused("std", "0", "numbers above 0");
  refused("std", "1 2 3 4", "numbers above 0");
  refused("class_names", R"(["a"])", "expected a list of 5 names");
  refused("class_names", R"([1,2,3,4,5])", "expected a list of 5 names");
  refused("class_names", "a,b", "not valid JSON");
  refused("num_heads", "four", "expected a number from 1");
  refused("num_heads", "0", "expected a number from 1");
}

TEST_CASE("the number of heads comes from the caller, the metadata, the architecture, or 64 channels a head") {
  const test::TempDir dir;
  const ModelFile model = golden_model("vit_dense.safetensors");
  write_timm(dir / "m", model, {{"num_heads", "8"}});
  CHECK(read_model(dir / "m").config.num_heads == 8);
  CHECK(read_model(dir / "m", {.image_size = {}, .num_heads = 2}).config.num_heads == 2);
  check_error(ExitCode::input, {"embed_dim 64", "num_heads 5"},
              [&] { (void)read_model(dir / "m", {.image_size = {}, .num_heads = 5}); });
  write_timm(dir / "m", model, {{"architecture", "unheard of"}});
  CHECK(read_model(dir / "m").config.num_heads == 1);
  write_timm(dir / "m", model, {{"architecture", "vit_base_patch16_224"}});
  check_error(ExitCode::input,
              {(dir / "m").string(), "'vit_base_patch16_224' (embed_dim 768, depth 12)", "embed_dim 64, depth 4"},
              [&] { (void)read_model(dir / "m"); });
  CHECK(read_model(dir / "m", {.image_size = {}, .num_heads = 4}).config.num_heads == 4);
}

TEST_CASE("a backbone without a head has no classes") {
  const test::TempDir dir;
  ModelFile model = golden_model("vit_dense.safetensors");
  model.weights.erase("head.weight");
  write_timm(dir / "m", model);
  check_error(ExitCode::input, {"'head.bias'", "none of this model's"}, [&] { (void)read_model(dir / "m"); });
  model.weights.erase("head.bias");
  write_timm(dir / "m", model);
  const ModelFile got = read_model(dir / "m");
  CHECK(got.config.num_classes == 0);
  write_model(dir / "ours", got);
  CHECK(read_model(dir / "ours").config == got.config);
}

TEST_CASE("what training wrappers and pretraining leave behind is taken off") {
  const test::TempDir dir;
  const ModelFile model = golden_model("vit_dense.safetensors");
  sdk::TensorMap wrapped;
  for (const auto& [name, tensor] : model.weights) wrapped.emplace("module._orig_mod." + name, tensor);
  wrapped.emplace("module._orig_mod.mask_token", at::zeros({1}));
  wrapped.emplace("module._orig_mod.decoder_embed.weight", at::zeros({1}));
  wrapped.emplace("module._orig_mod.pre_logits.fc.weight", at::zeros({1}));
  write_safetensors(dir / "m", wrapped, {{"num_heads", "4"}});
  check_equal(read_model(dir / "m").weights, model.weights);
}

TEST_CASE("tensors that do not fit are named with what was found and expected") {
  const test::TempDir dir;
  const auto refused = [&](const std::function<void(sdk::TensorMap&)>& change, std::vector<std::string> words) {
    ModelFile model = golden_model("vit_dense.safetensors");
    change(model.weights);
    write_timm(dir / "m", model);
    words.push_back((dir / "m").string());
    check_error(ExitCode::input, words, [&] { (void)read_model(dir / "m"); });
  };
  const auto set = [](const char* name, at::Tensor tensor) {
    return [=](sdk::TensorMap& weights) { weights.insert_or_assign(name, tensor); };
  };
  const auto drop = [](const char* name) { return [=](sdk::TensorMap& weights) { weights.erase(name); }; };
  refused([](auto& weights) { weights.clear(); }, {"patch_embed.proj.weight", "not a ViT"});
  refused(drop("cls_token"), {"no tensor 'cls_token'"});
  refused(drop("pos_embed"), {"no tensor 'pos_embed'"});
  refused(drop("norm.weight"), {"no tensor 'norm.weight'", "[64]"});
  refused(drop("blocks.1.attn.qkv.bias"), {"no tensor 'blocks.1.attn.qkv.bias'", "[192]"});
  refused(drop("blocks.1.attn.qkv.weight"), {"'blocks.1.attn", "depth 1"});
  refused(set("blocks.2.mlp.fc2.weight", at::zeros({64, 255})),
          {"'blocks.2.mlp.fc2.weight'", "[64, 255]", "[64, 256]"});
  refused(set("pos_embed", at::zeros({1, 63, 64})), {"'pos_embed'", "63 tokens"});
  refused(set("pos_embed", at::zeros({65, 64})), {"'pos_embed'", "[65, 64]"});
  refused(set("pos_embed", at::zeros({1, 0, 64})), {"'pos_embed'", "0 tokens"});
  refused(set("patch_embed.proj.weight", at::zeros({64, 1, 4, 4})), {"patch_embed.proj.weight", "[64, 1, 4, 4]"});
  refused(set("patch_embed.proj.weight", at::zeros({64, 3, 4, 5})), {"4 x 5"});
  refused(set("patch_embed.proj.weight", at::zeros({0, 3, 4, 4})), {"'cls_token'"});
  refused(set("head.bias", at::zeros({5}, at::kLong)), {"'head.bias'", "I64", "expected F32"});
  refused(set("surprise", at::zeros({1})), {"'surprise'", "none of this model's"});
  refused(set("blocks.0.ls1.gamma", at::zeros({64})), {"no tensor 'blocks.0.ls2.gamma'"});
  refused(set("blocks.0.gamma_1", at::zeros({63})), {"'blocks.0.gamma_1'", "[63]", "[embed_dim]"});
  refused(set("blocks.1.ls1.gamma", at::zeros({64})), {"'blocks.1.ls1.gamma'", "none of this model's"});
  refused(set("reg_token", at::zeros({1, 4, 64})), {"'pos_embed'", "65 tokens", "5 before them"});
  refused(set("reg_token", at::zeros({1, 99, 64})), {"'pos_embed'"});
  refused(set("blocks.0.mlp.w12.weight", at::zeros({64})), {"w12", "SwiGLU"});
  refused(set("blocks.0.attn.q_norm.weight", at::zeros({16})), {"q_norm", "normalised queries"});
  refused(set("norm_pre.weight", at::zeros({64})), {"norm_pre", "norm before the blocks"});
  refused(
      [](auto& weights) {
        weights = {{"vit.embeddings.patch_embeddings.projection.weight", at::zeros({1})}};
      },
      {"Hugging Face transformers' names"});
  refused(
      [](auto& weights) {
        weights = {{"base_model.model.blocks.0.attn.qkv.lora_A.weight", at::zeros({1})}};
      },
      {"PEFT adapter", "merge-lora"});
}

TEST_CASE("our own metadata is checked key by key") {
  const test::TempDir dir;
  const auto refused = [&](const std::string& pointer, const json& value, std::vector<std::string> words) {
    INFO(pointer << " = " << value.dump());
    write_changed(dir / "m", pointer, value);
    words.push_back((dir / "m").string());
    check_error(ExitCode::input, words, [&] { (void)read_model(dir / "m"); });
  };
  refused("/format", 2, {"format is 2", "reads format 1"});
  refused("/format", "1", {"format is a string"});
  refused("/arch", 1, {"arch is an integer, expected an object"});
  refused("/arch/depth", "4", {"arch.depth is a string, expected an integer"});
  refused("/arch/depth", 4.5, {"arch.depth is a number with a fraction"});
  refused("/arch/depth", uint64_t{1} << 63, {"arch.depth", "too large"});
  refused("/arch/depth", 1'000'000'000, {"depth is 1000000000"});
  refused("/arch/depth", 5, {"merge.schedule.remove has 4 entries", "5 blocks"});
  refused("/arch/embed_dim", 128, {"[1, 1, 64]", "[1, 1, 128]"});
  refused("/arch/num_heads", 5, {"not a multiple of num_heads 5"});
  refused("/arch/num_heads", 0, {"num_heads is 0"});
  refused("/arch/image_size", -32, {"image_size is -32"});
  refused("/arch/patch_size", 5, {"not a multiple of patch_size 5"});
  refused("/arch/num_classes", 6, {"class_names has 5 names"});
  refused("/arch/pool", "max", {"arch.pool is 'max', expected 'token' or 'avg'"});
  refused("/arch/distilled", 0, {"arch.distilled is an integer, expected a boolean"});
  refused("/arch/norm_eps", -1.0, {"norm_eps is -1"});
  refused("/preprocess/size", 64, {"preprocess.size is 64", "32"});
  refused("/preprocess/resize", "stretch", {"preprocess.resize is 'stretch'"});
  refused("/preprocess/shorter", 31, {"preprocess.shorter is 31"});
  refused("/preprocess/shorter", 1'000'000'000, {"preprocess.shorter"});
  refused("/preprocess/mean", {0.5, 0.5}, {"preprocess.mean has 2 numbers"});
  refused("/preprocess/mean", {0.5, 0.5, 1e300}, {"preprocess.mean holds 1e+300"});
  refused("/preprocess/std", {0.5, 0.0, 0.5}, {"preprocess.std holds 0, expected more than 0"});
  refused("/preprocess/std", {"a", "b", "c"}, {"preprocess.std holds a string"});
  refused("/class_names", {"a", "b"}, {"class_names has 2 names"});
  refused("/class_names/0", 1, {"class_names holds an integer"});
  refused("/merge/name", "", {"merge.name"});
  refused("/merge/name", "tome", {"'merge.pyra.blocks.0.a'", "none of this model's"});
  refused("/merge/schedule/remove", {1, 2}, {"merge.schedule.remove has 2 entries", "4 blocks"});
  refused("/merge/schedule/remove", {1, 2, 3, -4}, {"merge.schedule.remove holds -4"});
  refused("/merge/schedule/remove", {1, 2, 3, 66}, {"merge.schedule.remove holds 66"});
  refused("/merge/schedule/prune", "x", {"merge.schedule.prune is a string"});
  refused("/merge/parameters", json::array(), {"merge.parameters is an array"});
  refused("/merge/parameters/list", {1}, {"merge.parameters.list holds an integer"});
  refused("/merge/parameters/word", nullptr, {"merge.parameters.word is null"});
  refused("/merge/proportional_attention", "yes", {"merge.proportional_attention is a string"});
  refused("/provenance/protocol", 1, {"provenance.protocol is an integer"});

  write_changed(dir / "m", "/arch/a_later_field", 1);
  CHECK(read_model(dir / "m").config == full_model().config);
}

TEST_CASE("a depth that the tensors do not bear out is refused") {
  const test::TempDir dir;
  ModelFile model = golden_model("vit_dense.safetensors");
  write_model(dir / "m", model);
  const SafetensorsFile file(dir / "m");
  const auto claim = [&](int64_t depth) {
    json metadata = json::parse(file.metadata().at("pyra"));
    metadata["arch"]["depth"] = depth;
    write_safetensors(dir / "claim", file.tensors(), {{"pyra", metadata.dump()}});
    return [&] { (void)read_model(dir / "claim"); };
  };
  check_error(ExitCode::input, {"no tensor 'blocks.4.norm1.weight'"}, claim(5));
  check_error(ExitCode::input, {"'blocks.3.", "none of this model's (depth 3"}, claim(3));
}

TEST_CASE("metadata that is no JSON, or JSON with a key twice, is refused by name") {
  const test::TempDir dir;
  const auto refused = [&](const std::string& text, const std::string& words) {
    write_safetensors(dir / "m", {}, {{"pyra", text}});
    check_error(ExitCode::input, {(dir / "m").string(), "metadata 'pyra'", words},
                [&] { (void)read_model(dir / "m"); });
  };
  refused("", "not valid JSON");
  refused("[]", "is an array, expected an object");
  refused("{}", "format is missing");
  refused(R"({"format":1})", "arch is missing");
  refused(R"({"format":1,"format":1})", "stands twice");
  refused(std::string(100'000, '['), "nested deeper");
}

TEST_CASE("position embeddings are resized as timm resizes them") {
  const SafetensorsFile fixture(fs::path(PYRA_TEST_DATA) / "io/timm_position_resize.safetensors");
  const test::TempDir dir;
  const auto [prefix, side, new_side] =
      GENERATE(table<int64_t, int64_t, int64_t>({{1, 8, 5}, {1, 8, 14}, {2, 5, 8}, {1, 4, 4}}));
  const std::string key = cat(prefix, ".", side, ".", new_side);
  INFO(key);
  const at::Tensor before = fixture.tensor(key + ".in");
  ModelFile model;
  model.config = {.arch = "",
                  .image_size = side * 2,
                  .patch_size = 2,
                  .embed_dim = 6,
                  .depth = 1,
                  .num_heads = 1,
                  .mlp_dim = 5,
                  .num_classes = 0,
                  .pool = nn::Pool::token,
                  .distilled = prefix == 2,
                  .norm_eps = 1e-6};
  model.preprocess.size = side * 2;
  for (const auto& [name, shape] : nn::tensor_shapes(model.config)) model.weights.emplace(name, at::zeros(shape));
  model.weights.insert_or_assign("pos_embed", before);
  write_model(dir / "m", model);
  const ModelFile got = read_model(dir / "m", {.image_size = new_side * 2, .num_heads = {}});
  CHECK(got.config.image_size == new_side * 2);
  CHECK(got.preprocess.size == new_side * 2);
  CHECK(test::max_difference(got.weights.at("pos_embed"), fixture.tensor(key + ".out")) < 1e-6);
}

TEST_CASE("an image size that the patches do not divide is refused") {
  const test::TempDir dir;
  write_model(dir / "m", full_model());
  const auto read = [&](int64_t size) {
    return [&dir, size] { (void)read_model(dir / "m", {.image_size = size, .num_heads = {}}); };
  };
  check_error(ExitCode::usage, {(dir / "m").string(), "preprocess.size is 33", "a multiple of 4"}, read(33));
  check_error(ExitCode::usage, {"preprocess.size is 0"}, read(0));
  check_error(ExitCode::usage, {"preprocess.size is -4"}, read(-4));
  check_error(ExitCode::input, {"image_size is 8192"}, read(8192));
  CHECK(read_model(dir / "m", {.image_size = 64, .num_heads = {}}).preprocess.shorter == 72);
}

TEST_CASE("timm's format carries all but the merge") {
  const test::TempDir dir;
  ModelFile model = full_model();
  check_error(ExitCode::usage, {(dir / "t").string(), "'pyra'", "--drop-merge"},
              [&] { write_model(dir / "t", model, ModelFormat::timm); });
  CHECK(fs::is_empty(dir.path()));
  model.merge.reset();
  write_model(dir / "t", model, ModelFormat::timm);
  const ModelFile got = read_model(dir / "t");
  CHECK(got.config == model.config);
  CHECK(got.class_names == model.class_names);
  CHECK(got.preprocess.mean == model.preprocess.mean);
  CHECK(got.preprocess.std == model.preprocess.std);
  CHECK(got.provenance == model.provenance);
  check_equal(got.weights, model.weights);
  CHECK_FALSE(SafetensorsFile(dir / "t").metadata().contains("pyra"));
}

TEST_CASE("text that is not UTF-8 cannot make a file that no one reads") {
  const test::TempDir dir;
  ModelFile model = full_model();
  model.provenance["command"] = "pyractl \xff";
  write_model(dir / "m", model);
  CHECK(read_model(dir / "m").provenance.at("command") == "pyractl \xEF\xBF\xBD");
}

TEST_CASE("a model that contradicts itself is not written") {
  const test::TempDir dir;
  ModelFile model = full_model();
  SECTION("a tensor is missing") {
    model.weights.erase("norm.bias");
  }
  SECTION("a tensor has another shape") {
    model.weights.insert_or_assign("norm.bias", at::zeros({3}));
  }
  SECTION("too few class names") {
    model.class_names.pop_back();
  }
  check_error(ExitCode::internal, {(dir / "m").string()}, [&] { write_model(dir / "m", model); });
  CHECK(fs::is_empty(dir.path()));
}

TEST_CASE("mutated metadata is read or refused, nothing else") {
  const test::TempDir dir;
  write_model(dir / "m", full_model());
  const SafetensorsFile file(dir / "m");
  const std::string source = file.metadata().at("pyra");
  const Philox random(11, RandomStream::split);
  const std::string tokens[] = {"{", "}", "[",           "]",   "\"",   ",",    ":",
                                "-", "0", "99999999999", "1e9", "null", "true", "\\ud800"};
  uint64_t draw = 0;
  int refused = 0, accepted = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string text = source;
    const auto place = [&] { return size_t(random.below(draw++, text.size())); };
    switch (random.below(draw++, 4)) {
      case 0:
        text[place()] = char('!' + random.below(draw++, 94));
        break;
      case 1:
        text.insert(place(), tokens[random.below(draw++, std::size(tokens))]);
        break;
      case 2:
        text.erase(place(), 1 + random.below(draw++, 8));
        break;
      default:
        text[text.find_first_of("0123456789", place() / 2)] = char('0' + random.below(draw++, 10));
    }
    // No tensors: nothing a changed config asks for may be made before their absence is noticed.
    test::put(dir / "mutated", test::safetensors_bytes("{\"__metadata__\":{\"pyra\":" + json_quoted(text) + "}}"));
    const auto error = test::error_of([&] { (void)read_model(dir / "mutated"); });
    REQUIRE(error);
    if (error->code() != ExitCode::input) FAIL("round " << round << ": " << error->what());
    ++(std::string(error->what()).find("has no tensor") == std::string::npos ? refused : accepted);
  }
  CHECK(refused > 500);
  CHECK(accepted > 100);
}

}  // namespace pyra::io
