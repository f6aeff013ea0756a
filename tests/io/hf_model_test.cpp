// Folders of Hugging Face transformers, against what the library itself wrote and computed (tests/data/hf/make.py).
#include "io/hf_model.h"

#include "io/atomic_file.h"
#include "io/hf_names.h"
#include "io/io_support.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "nn/vit.h"
#include "support.h"
#include "tensor_maps.h"

using namespace pyra;
using namespace pyra::io;
using test::check_error;
namespace fs = std::filesystem;

namespace {

const fs::path kHfFolders = fs::path(PYRA_TEST_DATA) / "hf";

at::Tensor logits_of(const ModelFile& file, const at::Tensor& images) {
  const at::NoGradGuard no_gradients;
  return nn::Vit(file.config, file.weights).forward(images);
}

/// A copy of the ViT fixture to change.
fs::path copy_of_vit(const test::TempDir& dir, const std::string& name = "vit") {
  fs::copy(kHfFolders / "vit", dir / name);
  return dir / name;
}

void rewrite(const fs::path& folder, const std::function<void(sdk::TensorMap&)>& change) {
  sdk::TensorMap tensors = SafetensorsFile(folder / kHfWeights).tensors();
  change(tensors);
  write_safetensors(folder / kHfWeights, tensors);
}

void set_key(const fs::path& folder, const std::string& key, const nlohmann::json& value) {
  nlohmann::json config = read_json(folder / "config.json");
  config[key] = value;
  write_file(folder / "config.json", config.dump());
}

}  // namespace

TEST_CASE("folders of transformers give its logits", "[hf]") {
  const SafetensorsFile expected(kHfFolders / "expected.safetensors");
  const at::Tensor images = expected.tensor("images");
  const ModelFile vit = read_model(kHfFolders / "vit"), deit = read_model(kHfFolders / "deit");
  CHECK(test::max_difference(logits_of(vit, images), expected.tensor("vit")) < 1e-5);
  CHECK(test::max_difference(logits_of(deit, images), expected.tensor("deit")) < 1e-5);
  CHECK(vit.class_names == std::vector<std::string>{"cat", "dog", "an ü"});
  CHECK(vit.config.norm_eps == 1e-12);
  CHECK(vit.config.image_size == 16);
  CHECK(vit.preprocess.mean == std::array<float, 3>{0.5f, 0.5f, 0.5f});
  CHECK(deit.config.distilled);
  CHECK(deit.class_names.empty());
  test::check_equal(vit.weights, read_model(kHfFolders / "vit_sharded").weights);
  CHECK(read_model(kHfFolders / "vit", {.image_size = 32}).config.tokens() == 65);
}

TEST_CASE("the spelling of transformers 5 and files without a classifier are read too", "[hf]") {
  const test::TempDir dir;
  const ModelFile vit = read_model(kHfFolders / "vit");
  const fs::path modules = copy_of_vit(dir, "modules"), bare = copy_of_vit(dir, "bare");
  rewrite(modules, [&](sdk::TensorMap& tensors) {
    for (const nn::TensorShape& shape : nn::tensor_shapes(vit.config)) {
      const auto from = hf_names(shape.name, "vit", false, HfSpelling::on_disk);
      const auto to = hf_names(shape.name, "vit", false, HfSpelling::modules);
      for (size_t i = 0; i < from.size(); ++i) {
        auto node = tensors.extract(from[i]);
        node.key() = to[i];
        tensors.insert(std::move(node));
      }
    }
    CHECK(tensors.contains("vit.layers.1.attention.k_proj.bias"));
  });
  test::check_equal(read_model(modules).weights, vit.weights);
  rewrite(bare, [](sdk::TensorMap& tensors) {
    sdk::TensorMap renamed;
    for (const auto& [name, tensor] : tensors)
      if (name.starts_with("vit.")) renamed[name.substr(4)] = tensor;
    renamed["pooler.dense.weight"] = at::zeros({32, 32});
    tensors = std::move(renamed);
  });
  const ModelFile body = read_model(bare);
  CHECK(body.config.num_classes == 0);
  CHECK(at::equal(body.weights.at("blocks.1.attn.qkv.weight"), vit.weights.at("blocks.1.attn.qkv.weight")));
}

TEST_CASE("query, key and value without biases get zeros", "[hf]") {
  const test::TempDir dir;
  const fs::path folder = copy_of_vit(dir);
  set_key(folder, "qkv_bias", false);
  rewrite(folder, [](sdk::TensorMap& tensors) {
    std::erase_if(tensors, [](const auto& item) {
      return item.first.find("attention.attention.") != item.first.npos && item.first.ends_with(".bias");
    });
  });
  CHECK(read_model(folder).weights.at("blocks.0.attn.qkv.bias").abs().max().item<float>() == 0);
}

TEST_CASE("what is written as a folder is read back the same", "[hf]") {
  const test::TempDir dir;
  for (const char* name : {"vit", "deit"}) {
    ModelFile model = read_model(kHfFolders / name);
    model.preprocess.mode = nn::ResizeMode::crop;
    model.preprocess.shorter = 20;
    model.preprocess.mean = {0.1f, 0.2f, 0.3f};
    write_model(dir / name, model, ModelFormat::hf);
    const ModelFile again = read_model(dir / name);
    test::check_equal(model.weights, again.weights);
    CHECK(again.config == model.config);
    CHECK(again.preprocess == model.preprocess);
    CHECK(again.class_names == model.class_names);
    check_error(ExitCode::output, {name, "already"}, [&] { write_model(dir / name, model, ModelFormat::hf); });
  }
  ModelFile model = read_model(kHfFolders / "vit");
  model.merge.emplace();
  model.merge->name = "tome";
  check_error(ExitCode::usage, {"tome", "--drop-merge"}, [&] { write_model(dir / "m", model, ModelFormat::hf); });
  CHECK_FALSE(fs::exists(dir / "m"));
}

TEST_CASE("a preprocessor's statistics and sizes are taken over", "[hf]") {
  const test::TempDir dir;
  const fs::path folder = copy_of_vit(dir), processor = folder / "preprocessor_config.json";
  write_file(processor, R"({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "do_center_crop": true,
                            "size": {"shortest_edge": 18}})");
  const ModelFile model = read_model(folder);
  CHECK(model.preprocess.mean == std::array<float, 3>{0.4f, 0.5f, 0.6f});
  CHECK(model.preprocess.mode == nn::ResizeMode::crop);
  CHECK(model.preprocess.shorter == 18);
  write_file(processor, R"({"image_mean": [0.4, 0.5, 0.6], "do_normalize": false})");
  CHECK(read_model(folder).preprocess.mean == std::array<float, 3>{0, 0, 0});
  CHECK(read_model(folder).preprocess.std == std::array<float, 3>{1, 1, 1});
  write_file(processor, R"({"image_mean": [1e39, 0, 0]})");
  check_error(ExitCode::input, {"preprocessor_config.json", "image_mean", "finite"}, [&] { (void)read_model(folder); });
  write_file(processor, R"({"image_std": [0.2, 0, 0.4]})");
  check_error(ExitCode::input, {"preprocessor_config.json", "image_std"}, [&] { (void)read_model(folder); });
  write_file(processor, R"({"do_center_crop": true, "size": 8})");
  check_error(ExitCode::input, {"preprocessor_config.json", "size", "8"}, [&] { (void)read_model(folder); });
}

TEST_CASE("an index and its files have to agree on where each tensor is", "[hf]") {
  const test::TempDir dir;
  const fs::path folder = dir / "vit", index = folder / "model.safetensors.index.json";
  fs::copy(kHfFolders / "vit_sharded", folder);
  const nlohmann::json good = nlohmann::json::parse(read_file(index, 1 << 20));
  const std::string first = "model-00001-of-00002.safetensors", second = "model-00002-of-00002.safetensors";
  const auto refuses = [&](const std::string& tensor, const std::string& file, const std::vector<std::string>& words) {
    nlohmann::json changed = good;
    changed["weight_map"][tensor] = file;
    write_file(index, changed.dump());
    check_error(ExitCode::input, words, [&] { (void)read_model(folder); });
  };
  const std::string moved = good["weight_map"].begin().key(), was = good["weight_map"].begin().value();
  refuses(moved, was == first ? second : first, {"index.json", moved, "but it is in " + was});
  refuses("vit.no_such", first, {"index.json", "'vit.no_such'", first, "does not hold it"});
  write_file(index, good.dump());
  fs::copy_file(folder / first, folder / second, fs::copy_options::overwrite_existing);
  check_error(ExitCode::input, {second, "stands in " + first}, [&] { (void)read_model(folder); });
}

TEST_CASE("a folder that is another model's or damaged is refused by file and key", "[hf]") {
  const test::TempDir dir;
  const auto refuses = [&](const std::string& key, const nlohmann::json& value, const std::vector<std::string>& words) {
    const fs::path folder = copy_of_vit(dir);
    set_key(folder, key, value);
    CAPTURE(key);
    check_error(ExitCode::input, words, [&] { (void)read_model(folder); });
    fs::remove_all(folder);
  };
  refuses("model_type", "swin", {"config.json", "model_type", "swin"});
  refuses("hidden_act", "gelu_new", {"config.json", "hidden_act", "gelu_new"});
  refuses("hidden_size", "big", {"config.json", "hidden_size", "integer"});
  refuses("hidden_size", 48, {"model.safetensors", "vit.embeddings.cls_token", "48"});
  refuses("num_hidden_layers", int64_t{1} << 40, {"config.json", "depth"});
  refuses("num_hidden_layers", 1, {"model.safetensors", "vit.encoder.layer.1"});
  refuses("num_hidden_layers", 3, {"vit.encoder.layer.2"});
  refuses("num_channels", 1, {"config.json", "num_channels"});

  const fs::path folder = copy_of_vit(dir);
  fs::remove(folder / kHfWeights);
  check_error(ExitCode::input, {"model.safetensors"}, [&] { (void)read_model(folder); });
  for (const char* file : {"../vit/model.safetensors", "..", "", "/etc/passwd", "a\nb", "a\x1b[2J"}) {
    write_file(folder / "model.safetensors.index.json",
               nlohmann::json{{"weight_map", {{"vit.embeddings.cls_token", file}}}}.dump());
    CAPTURE(file);
    check_error(ExitCode::input, {"index", "of this folder"}, [&] { (void)read_model(folder); });
  }
  fs::remove(folder / "model.safetensors.index.json");
  fs::create_symlink("model.safetensors.index.json", folder / "model.safetensors.index.json");
  check_error(ExitCode::input, {"index.json"}, [&] { (void)read_model(folder); });
  check_error(ExitCode::input, {"Hugging Face", "give the folder"},
              [&] { (void)read_model(kHfFolders / "vit" / kHfWeights); });
}
