// Adapters of Hugging Face peft, as the library itself wrote them (tests/data/peft/make.py), and spoilt ones.
#include "io/peft_adapter.h"

#include <ATen/ATen.h>

#include "io/atomic_file.h"
#include "io/io_support.h"
#include "io/json.h"
#include "support.h"

using namespace pyra;
using namespace pyra::io;
using test::check_error;
namespace fs = std::filesystem;

namespace {

const fs::path kAdapters = fs::path(PYRA_TEST_DATA) / "peft";

ModelFile timm_base() {
  return read_model(kAdapters / "timm_base.safetensors");
}
ModelFile hf_base() {
  return read_model(fs::path(PYRA_TEST_DATA) / "hf" / "vit");
}

/// A copy of a fixture to spoil.
class Copy {
 public:
  explicit Copy(const std::string& name) : path(dir_ / name) { fs::copy(kAdapters / name, path); }

  void set(const std::string& key, const nlohmann::json& value) const {
    nlohmann::json config = read_json(path / kPeftConfig);
    config[key] = value;
    write_file(path / kPeftConfig, config.dump());
  }
  void change(const std::function<void(sdk::TensorMap&)>& by) const {
    sdk::TensorMap tensors = SafetensorsFile(path / kPeftWeights).tensors();
    by(tensors);
    write_safetensors(path / kPeftWeights, tensors);
  }
  void rename(const std::string& from, const std::string& to) const {
    change([&](sdk::TensorMap& tensors) {
      auto node = tensors.extract(from);
      REQUIRE_FALSE(node.empty());
      node.key() = to;
      tensors.insert(std::move(node));
    });
  }
  void refuses(const ModelFile& base, const std::vector<std::string>& words) const {
    check_error(ExitCode::input, words, [&] { (void)read_peft_adapter(path, base); });
  }

 private:
  test::TempDir dir_;

 public:
  fs::path path;
};

/// A config with nothing in it but these keys and the type.
PeftConfig config_of(const nlohmann::json& keys) {
  const test::TempDir dir;
  nlohmann::json config{{"peft_type", "LORA"}};
  config.update(keys);
  write_file(dir / "c.json", config.dump());
  return read_peft_config(dir / "c.json");
}

constexpr const char* kQkvA = "base_model.model.blocks.0.attn.qkv.lora_A.weight";

}  // namespace

TEST_CASE("terms of an adapter find their layers, parts and scales", "[peft]") {
  const PeftAdapter timm = read_peft_adapter(kAdapters / "timm_qkv", timm_base());
  CHECK(timm.naming.names == PeftNames::timm);
  REQUIRE(timm.terms.size() == 2);
  const PeftTerm& fused = timm.terms.at("blocks.1.attn.qkv").at(0);
  CHECK(fused.parts == 1);
  CHECK(fused.scale == 2);
  CHECK(fused.a.sizes() == at::IntArrayRef{4, 32});
  CHECK(timm.num_classes == 3);
  CHECK(timm.brings_head);
  CHECK(timm.weights.at("head.weight").sizes() == at::IntArrayRef{3, 32});

  for (const char* name : {"hf_qv", "hf4_qv"}) {
    const PeftAdapter hf = read_peft_adapter(kAdapters / name, hf_base());
    CAPTURE(name);
    CHECK(hf.naming.names == (std::string(name) == "hf_qv" ? PeftNames::hf : PeftNames::hf4));
    CHECK(hf.naming.model == "vit");
    const auto& parts = hf.terms.at("blocks.0.attn.qkv");
    REQUIRE(parts.size() == 2);
    CHECK(parts[0].part + parts[1].part == 2);
    CHECK(parts[0].parts == 3);
    CHECK(hf.num_classes == 4);
  }

  const PeftAdapter patterns = read_peft_adapter(kAdapters / "timm_patterns", timm_base());
  CHECK(patterns.terms.at("blocks.0.attn.qkv")[0].scale == Approx(2 / std::sqrt(2.0)));
  CHECK(patterns.terms.at("blocks.1.attn.qkv")[0].scale == Approx(2 / std::sqrt(4.0)));
  CHECK(patterns.terms.at("blocks.0.mlp.fc1")[0].scale == Approx(6 / std::sqrt(3.0)));
  CHECK(patterns.terms.at("blocks.1.mlp.fc2")[0].scale == Approx(5 / std::sqrt(4.0)));
  CHECK_FALSE(patterns.brings_head);
  // lora_bias stands in the biases at once.
  CHECK(test::max_difference(patterns.weights.at("blocks.0.mlp.fc1.bias"),
                             timm_base().weights.at("blocks.0.mlp.fc1.bias")) > 0.01);

  const PeftAdapter convolution = read_peft_adapter(kAdapters / "timm_bias_all", timm_base());
  CHECK(convolution.terms.at("patch_embed.proj")[0].a.sizes() == at::IntArrayRef{2, 48});
}

TEST_CASE("the base model's tensors stay as they are", "[peft]") {
  const ModelFile base = hf_base();
  const at::Tensor before = base.weights.at("blocks.0.attn.qkv.bias").clone();
  (void)read_peft_adapter(kAdapters / "hf_all_linear", base);
  CHECK(at::equal(base.weights.at("blocks.0.attn.qkv.bias"), before));
}

TEST_CASE("an adapter on a model with register tokens is read, one in front of LayerScale refused", "[peft]") {
  ModelFile base = timm_base();
  base.config.registers = 2;
  base.weights["reg_token"] = at::zeros({1, 2, 32});
  base.weights["pos_embed"] = at::zeros({1, base.config.tokens(), 32});
  CHECK(read_peft_adapter(kAdapters / "timm_qkv", base).terms.size() == 2);

  base = timm_base();
  base.config.layer_scale = true;
  CHECK(read_peft_adapter(kAdapters / "timm_qkv", base).terms.size() == 2);
  check_error(ExitCode::input, {"LayerScale", "merge_and_unload"},
              [&] { (void)read_peft_adapter(kAdapters / "timm_bias_all", base); });
}

TEST_CASE("names, expressions and layers choose modules as in peft", "[peft]") {
  const auto terms = [](const nlohmann::json& keys) {
    const PeftConfig config = config_of(keys);
    std::string hits;
    for (const char* module : {"blocks.0.attn.proj", "blocks.11.attn.proj", "patch_embed.proj", "xproj", "head"})
      hits += config.has_term(module) ? '1' : '0';
    return hits;
  };
  CHECK(terms({{"target_modules", {"proj"}}}) == "11100");
  CHECK(terms({{"target_modules", {"attn.proj"}}}) == "11000");
  CHECK(terms({{"target_modules", {"blocks.0.attn.proj", "head"}}}) == "10001");
  CHECK(terms({{"target_modules", R"(.*\.attn\.proj)"}}) == "11000");
  CHECK(terms({{"target_modules", R"(blocks\.(0|1)\.attn\.proj)"}}) == "10000");
  CHECK(terms({{"target_modules", {"proj"}}, {"exclude_modules", {"patch_embed.proj"}}}) == "11000");
  CHECK(terms({{"target_modules", {"proj"}}, {"exclude_modules", R"(blocks\.1.*)"}}) == "10100");
  CHECK(terms({{"target_modules", {"proj"}}, {"layers_to_transform", 11}}) == "01000");
  CHECK(terms({{"target_modules", {"proj"}}, {"layers_to_transform", {0, 1}}, {"layers_pattern", "blocks"}}) ==
        "10000");
  CHECK(terms({{"target_modules", {"proj"}}, {"layers_to_transform", {0}}, {"layers_pattern", {"layers"}}}) == "00000");
  CHECK(terms({{"target_modules", {"proj", "head"}}, {"modules_to_save", {"head"}}}) == "11100");
  const PeftConfig config = config_of({{"r", 4}, {"lora_alpha", 2.5}, {"rank_pattern", {{"qkv", 8}, {"^head", 2}}}});
  CHECK(config.rank_of("blocks.0.attn.qkv") == 8);
  CHECK(config.rank_of("xqkv") == 4);
  CHECK(config.rank_of("head") == 2);
  CHECK(config.rank_of("a.head") == 4);
  CHECK(config.scale_of("blocks.0.attn.qkv") == 2.5 / 8);
  CHECK_FALSE(config.targets.match("head"));
  CHECK(config.targets.unknown);
  // Python's own syntax is not understood: the tensors tell which modules there are.
  for (const char* expression : {"(?P<a>x)", "(", "(a)\\1", "a{9}", "(?<=x)y"}) {
    CAPTURE(expression);
    CHECK(config_of({{"target_modules", expression}}).targets.unknown);
  }
}

TEST_CASE("an expression that would take for ever elsewhere takes no time", "[peft]") {
  const PeftConfig config = config_of({{"target_modules", "(a*)*(a*)*(a*)*b"}});
  CHECK_FALSE(config.targets.match(std::string(2000, 'a')));
}

TEST_CASE("an adapter that is more than plain LoRA is refused by name", "[peft]") {
  const Copy copy("timm_qkv");
  const auto refuses = [&](const std::string& key, const nlohmann::json& value, const std::vector<std::string>& words) {
    const nlohmann::json before = read_json(copy.path / kPeftConfig);
    copy.set(key, value);
    CAPTURE(key);
    std::vector<std::string> all{kPeftConfig, key};
    all.insert(all.end(), words.begin(), words.end());
    copy.refuses(timm_base(), all);
    write_file(copy.path / kPeftConfig, before.dump());
  };
  refuses("peft_type", "IA3", {"IA3", "LORA"});
  refuses("use_dora", true, {"DoRA"});
  refuses("use_qalora", true, {"QA-LoRA"});
  refuses("use_bdlora", nlohmann::json{{"nblocks", 2}}, {"block-diagonal"});
  refuses("layer_replication", {{0, 1}}, {"replicated"});
  refuses("target_parameters", {"attn.qkv.weight"}, {"parameters"});
  refuses("megatron_config", nlohmann::json{{"a", 1}}, {"Megatron"});
  refuses("loftq_config", nlohmann::json{{"loftq_bits", 4}}, {"LoftQ"});
  refuses("kasa_config", nlohmann::json{{"a", 1}}, {"KaSA"});
  refuses("arrow_config", nlohmann::json{{"a", 1}}, {"Arrow"});
  refuses("alora_invocation_tokens", {1, 2}, {"activated LoRA"});
  refuses("trainable_token_indices", {1}, {"token"});
  refuses("init_lora_weights", "pissa", {"pissa", "path_initial_model_for_weight_conversion"});
  refuses("init_lora_weights", "pissa_niter_4", {"pissa_niter_4"});
  refuses("init_lora_weights", "olora", {"olora"});
  refuses("use_newlora", true, {"not known"});
  refuses("new_config", nlohmann::json{{"a", 1}}, {"not known"});
  refuses("r", 0, {"rank 0"});
  refuses("r", int64_t{1} << 40, {"rank"});
  refuses("r", "four", {"integer"});
  refuses("lora_alpha", 1e300, {"1e9"});
  refuses("rank_pattern", nlohmann::json{{"qkv", 1.5}}, {"rank 1.5"});
  refuses("alpha_pattern", nlohmann::json{{"(", 1}}, {"expression"});
  refuses("alpha_pattern", nlohmann::json{{"a name longer than what fits into a string itself", "x"}}, {"number"});
  refuses("target_modules", 7, {"array"});
  refuses("modules_to_save", {1}, {"strings"});
  // What is there but not used, and what changes nothing, is no reason.
  for (const auto& [key, value] : {std::pair<std::string, nlohmann::json>{"use_dora", false},
                                   {"megatron_config", nullptr},
                                   {"init_lora_weights", "gaussian"},
                                   {"lora_dropout", 0.5},
                                   {"fan_in_fan_out", true},
                                   {"some_group_size", 16},
                                   {"task_type", "SEQ_CLS"}}) {
    copy.set(key, value);
    CHECK_NOTHROW((void)read_peft_adapter(copy.path, timm_base()));
  }
}

TEST_CASE("tensors that do not fit the base model or the config are named", "[peft]") {
  const std::string a = kQkvA;
  SECTION("another rank") {
    const Copy copy("timm_qkv");
    copy.set("r", 5);
    copy.refuses(timm_base(), {a, "[4, 32]", "[5, 32]", "timm_base"});
  }
  SECTION("half a term") {
    const Copy copy("timm_qkv");
    copy.change([&](sdk::TensorMap& tensors) { tensors.erase(a); });
    copy.refuses(timm_base(), {a, "half of a term"});
  }
  SECTION("a whole term gone") {
    const Copy copy("timm_qkv");
    copy.change([](sdk::TensorMap& tensors) {
      std::erase_if(tensors, [](const auto& item) { return item.first.find("blocks.0.") != std::string::npos; });
    });
    copy.refuses(timm_base(), {a, "target_modules"});
  }
  SECTION("a term that the config does not name") {
    const Copy copy("timm_bias_all");
    copy.set("target_modules", {"qkv"});
    copy.refuses(timm_base(), {"blocks.0.attn.proj", "none", "target_modules"});
  }
  SECTION("the head that modules_to_save names is gone") {
    const Copy copy("timm_qkv");
    copy.change([](sdk::TensorMap& tensors) {
      tensors.erase("base_model.model.head.weight");
      tensors.erase("base_model.model.head.bias");
    });
    copy.refuses(timm_base(), {"head.", "modules_to_save"});
  }
  SECTION("half a head") {
    const Copy copy("timm_qkv");
    copy.change([](sdk::TensorMap& tensors) { tensors.erase("base_model.model.head.bias"); });
    copy.refuses(timm_base(), {"head.bias", "3 classes"});
  }
  SECTION("a head of another width") {
    const Copy copy("timm_qkv");
    copy.change([](sdk::TensorMap& tensors) { tensors["base_model.model.head.weight"] = at::zeros({3, 31}); });
    copy.refuses(timm_base(), {"head.weight", "[3, 31]"});
  }
  SECTION("no head on either side") {
    const Copy copy("timm_patterns");
    ModelFile base = timm_base();
    base.config.num_classes = 0;
    base.weights.erase("head.weight");
    base.weights.erase("head.bias");
    copy.refuses(base, {"no head", "head.weight", "modules_to_save"});
    CHECK(read_peft_adapter(kAdapters / "timm_qkv", base).num_classes == 3);
  }
  SECTION("a deeper model's") {
    const Copy copy("timm_qkv");
    for (const std::string half : {"A", "B"})
      copy.rename(cat("base_model.model.blocks.0.attn.qkv.lora_", half, ".weight"),
                  cat("base_model.model.blocks.2.attn.qkv.lora_", half, ".weight"));
    copy.refuses(timm_base(), {"blocks.2.attn.qkv", "depth 2", "trained on"});
  }
  SECTION("no ViT's at all") {
    const Copy copy("timm_qkv");
    copy.change([](sdk::TensorMap& tensors) {
      tensors = {{"base_model.model.layers.0.self_attn.q_proj.lora_A.weight", at::zeros({4, 32})},
                 {"base_model.model.layers.0.self_attn.q_proj.lora_B.weight", at::zeros({32, 4})}};
    });
    copy.refuses(timm_base(), {"self_attn.q_proj", "timm or transformers"});
  }
  SECTION("DoRA's magnitudes") {
    const Copy copy("timm_qkv");
    copy.change([](sdk::TensorMap& tensors) {
      tensors["base_model.model.blocks.0.attn.qkv.lora_magnitude_vector"] = at::ones({96});
    });
    copy.refuses(timm_base(), {"lora_magnitude_vector", "DoRA"});
  }
  SECTION("no prefix") {
    const Copy copy("timm_qkv");
    copy.rename(a, "blocks.0.attn.qkv.lora_A.weight");
    copy.refuses(timm_base(), {"blocks.0.attn.qkv.lora_A.weight", "base_model.model."});
  }
  SECTION("no term") {
    const Copy copy("timm_qkv");
    copy.change([](sdk::TensorMap& tensors) {
      std::erase_if(tensors, [](const auto& item) { return item.first.find("lora_") != std::string::npos; });
    });
    copy.refuses(timm_base(), {"no LoRA term"});
  }
  SECTION("not finite") {
    const Copy copy("timm_qkv");
    const std::string key = GENERATE(as<std::string>{}, kQkvA, "base_model.model.blocks.1.attn.qkv.lora_B.weight");
    copy.change([&](sdk::TensorMap& tensors) { tensors[key][0][0] = std::nan(""); });
    copy.refuses(timm_base(), {key, "not finite"});
  }
  SECTION("integers") {
    const Copy copy("timm_qkv");
    copy.change([&](sdk::TensorMap& tensors) { tensors[a] = at::zeros({4, 32}, at::kLong); });
    copy.refuses(timm_base(), {a});
  }
  SECTION("an unknown tensor") {
    const Copy copy("timm_qkv");
    copy.change([](sdk::TensorMap& tensors) { tensors["base_model.model.blocks.0.ls1.gamma"] = at::ones({32}); });
    copy.refuses(timm_base(), {"blocks.0.ls1.gamma", "none of the base"});
  }
}

TEST_CASE("a folder that is no adapter of today's peft says what it is", "[peft]") {
  const test::TempDir dir;
  const auto refuses = [&](const fs::path& folder, const std::vector<std::string>& words) {
    check_error(ExitCode::input, words, [&] { (void)read_peft_adapter(folder, timm_base()); });
  };
  refuses(dir / "nowhere", {"nowhere", kPeftConfig});
  fs::create_directories(dir / "outer");
  fs::copy(kAdapters / "timm_qkv", dir / "outer/mine");
  refuses(dir / "outer", {kPeftConfig, "outer/mine", "give that folder"});
  fs::remove(dir / "outer/mine" / kPeftWeights);
  refuses(dir / "outer/mine", {kPeftWeights});
  write_file(dir / "outer/mine/adapter_model.bin", "PK\x03\x04");
  refuses(dir / "outer/mine", {"adapter_model.bin", "pickle", "save_pretrained"});
  write_file(dir / "outer/mine" / kPeftConfig, "[]");
  write_file(dir / "outer/mine" / kPeftWeights, "");
  refuses(dir / "outer/mine", {"empty"});
}
