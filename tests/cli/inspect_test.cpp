#include "fixtures.h"
#include "io/safetensors.h"

using namespace pyra;
using namespace pyra::test;

namespace {

/// A safetensors file with this header and `data` zero bytes after it.
std::string with_header(const std::string& header, size_t data = 0) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += char(uint64_t(header.size()) >> (8 * i));
  return bytes + header + std::string(data, '\0');
}

/// The same, but the length is what `length` says.
std::string with_length(uint64_t length, const std::string& rest) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += char(length >> (8 * i));
  return bytes + rest;
}

std::string one_tensor(const std::string& shape, const std::string& offsets) {
  return cat(R"({"w":{"dtype":"F32","shape":)", shape, R"(,"data_offsets":)", offsets, "}}");
}

/// The workshop's own model with something of its metadata exchanged; the header keeps its length.
std::string with_metadata(std::string bytes, const std::string& from, const std::string& to) {
  const size_t at = bytes.find(from);
  REQUIRE(at != std::string::npos);
  REQUIRE(from.size() == to.size());
  return bytes.replace(at, from.size(), to);
}

struct Hostile {
  std::string name, bytes;
  std::vector<std::string> says;  ///< besides the file's name
};

std::vector<Hostile> hostile_files(const std::string& model) {
  const std::string nested = std::string(100'000, '[');
  return {
      {"empty", "", {"empty"}},
      {"three_bytes", "abc", {}},
      {"cut_in_header", model.substr(0, 100), {}},
      {"cut_in_data", model.substr(0, model.size() - 1), {}},
      {"longer", model + "x", {}},
      {"header_2_62", with_length(uint64_t{1} << 62, "{}"), {}},
      {"header_negative", with_length(~uint64_t{0}, "{}"), {}},
      {"header_beyond_end", with_length(1000, "{}"), {}},
      {"no_json", with_header("hello, world"), {}},
      {"list", with_header("[1, 2]"), {}},
      {"brackets", with_header(nested), {}},
      {"brackets_in_entry", with_header(cat(R"({"w":)", nested, "}")), {}},
      {"brackets_in_metadata", with_header(cat(R"({"__metadata__":{"pyra":")", nested, R"("}})")), {}},
      {"shape_overflow", with_header(one_tensor("[4294967296,4294967296]", "[0,16]"), 16), {"'w'"}},
      {"shape_overflow_to_4", with_header(one_tensor("[9223372036854775807,3]", "[0,4]"), 4), {"'w'"}},
      {"shape_negative", with_header(one_tensor("[-1]", "[0,4]"), 4), {"'w'"}},
      {"shape_fraction", with_header(one_tensor("[1.5]", "[0,4]"), 4), {"'w'"}},
      {"offsets_beyond", with_header(one_tensor("[4]", "[0,16]"), 8), {"short"}},
      {"offsets_far", with_header(one_tensor("[4]", "[18446744073709551600,18446744073709551615]"), 8), {"'w'"}},
      {"offsets_negative", with_header(one_tensor("[4]", "[-16,0]"), 16), {"'w'"}},
      {"offsets_reversed", with_header(one_tensor("[4]", "[16,0]"), 16), {"'w'"}},
      {"dtype_unknown", with_header(R"({"w":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}})", 4), {"F33"}},
      {"pickle", std::string("\x80\x02}q\x00.", 6) + std::string(100, 'x'), {"pickle"}},
      {"zip", std::string("PK\x03\x04") + std::string(100, 'x'), {"zip"}},
      {"lfs_pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n", {"Git LFS"}},
      {"html", "<!DOCTYPE html><html><body>404</body></html>", {"HTML"}},
  };
}

}  // namespace

TEST_CASE("hostile model files are exit 3, one line, naming the file") {
  const Workshop shop;
  for (const Hostile& file : hostile_files(read_bytes(shop / "model.safetensors"))) {
    const std::string name = file.name + ".safetensors";
    write_bytes(shop / name, file.bytes);
    std::vector<std::string> says = file.says;
    says.push_back(name);
    for (const std::string& line : {"inspect " + name, "eval " + name + " --data task"})
      check_refusal(shop, {line, 3, says});
  }
  check_json_refusal(shop, "inspect brackets.safetensors", 3);
}

TEST_CASE("a model whose description is a lie is exit 3, naming the file") {
  const Workshop shop;
  const std::string model = read_bytes(shop / "model.safetensors");
  const std::vector<std::pair<std::string, std::string>> lies{
      {R"(embed_dim\":32)", R"(embed_dim\":99)"}, {R"(depth\":3)", R"(depth\":9)"},
      {R"(num_heads\":2)", R"(num_heads\":0)"},   {R"(num_heads\":2)", R"(num_heads\":7)"},
      {R"(patch_size\":4)", R"(patch_size\":0)"}, {R"(image_size\":16)", R"(image_size\":-1)"},
      {R"(mlp_dim\":64)", R"(mlp_dim\":1})"},
  };
  for (size_t i = 0; i < lies.size(); ++i) {
    const std::string name = cat("lie", i, ".safetensors");
    CAPTURE(lies[i].second);
    write_bytes(shop / name, with_metadata(model, lies[i].first, lies[i].second));
    check_refusal(shop, {"inspect " + name, 3, {name}});
    check_refusal(shop, {"eval " + name + " --data task", 3, {name}});
  }
}

TEST_CASE("inspect describes a model") {
  const Workshop shop;
  const auto document = json_of(shop, "inspect model.safetensors");
  CHECK(document["kind"] == "model");
  CHECK(document["depth"] == 3);
  CHECK(document["tokens"] == 17);
  CHECK(document["class_names"][5] == "class-5");
  CHECK(document["macs"] == document["dense_macs"]);
  CHECK(document["merge"].is_null());
  int64_t elements = 0;
  for (const auto& tensor : document["tensors"]) {
    int64_t product = 1;
    for (const int64_t extent : tensor["shape"]) product *= extent;
    elements += product;
  }
  CHECK(document["params"] == elements);
  const RunResult human = in(shop, "inspect model.safetensors");
  CHECK(human.out.find("3 blocks of width 32") != std::string::npos);
}

TEST_CASE("inspect tells what else there is") {
  const Workshop shop;
  CHECK(json_of(shop, "inspect " PYRA_TEST_DATA "/goldens/vit_dense.safetensors")["kind"] == "safetensors");
  const auto dataset = json_of(shop, "inspect task");
  CHECK(dataset["kind"] == "dataset");
  CHECK(dataset["class_names"].size() == 6);
  CHECK(dataset["images_by_class"]["test"] == std::vector<int>{1, 1, 1, 1, 1, 1});
  const auto image = json_of(shop, "inspect task/images/3.ppm");
  CHECK(image["kind"] == "image");
  CHECK(image["width"] == 23);
  write_bytes(shop / "r.toml", "seed = 3\n[train]\nepochs = 2\n");
  CHECK(json_of(shop, "inspect r.toml")["resolved"].get<std::string>().find("epochs = 2") != std::string::npos);

  write_bytes(shop / "adapter/adapter_config.json", R"({"peft_type":"LORA","r":4,"target_modules":["attn.qkv"]})");
  check_refusal(shop, {"inspect adapter", 3, {"adapter", "adapter_model.safetensors"}});
  const sdk::TensorMap term{{"base_model.model.blocks.0.attn.qkv.lora_A.weight", at::zeros({4, 32})}};
  io::write_safetensors(shop / "adapter/adapter_model.safetensors", term, {{"pyra", R"({"classes":[]})"}});
  const auto adapter = json_of(shop, "inspect adapter");
  CHECK(adapter["kind"] == "adapter");
  CHECK(adapter["config"]["r"] == 4);
  CHECK(adapter["elements"] == 128);
  CHECK(adapter["merger"].is_null());
  CHECK(in(shop, "inspect adapter").out.find("LORA") != std::string::npos);
  CHECK(json_of(shop, "inspect adapter/adapter_model.safetensors")["kind"] == "safetensors");

  write_bytes(shop / "run/run.toml",
              "model = \"m.safetensors\"\ndata = \"task\"\n[merge]\nname = \"pyra\"\nschedule = \"high\"\n");
  write_bytes(shop / "run/metrics.jsonl", "{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"lo");
  const auto going = json_of(shop, "inspect run");
  CHECK(going["kind"] == "run");
  CHECK(going["merge"] == "pyra");
  CHECK(going["report"].is_null());
  CHECK(going["last_metrics"]["step"] == 1);
  write_bytes(shop / "run/report.json", "{\"test\":{\"top1\":0.5},\"protocol\":\"vtab\"}");
  CHECK(json_of(shop, "inspect run")["report"]["test"]["top1"] == 0.5);
}

TEST_CASE("inspect refuses what it does not know, saying what it is") {
  const Workshop shop;
  std::filesystem::create_directory(shop / "nothing");
  write_bytes(shop / "r.toml", "sed = 3\n");
  write_bytes(shop / "bad/run.toml", "= = =\n");
  write_bytes(shop / "deep/run.toml", "seed = 1\n");
  write_bytes(shop / "deep/report.json", std::string(100'000, '['));
  for (const Refusal& refusal : std::vector<Refusal>{
           {"inspect none", 3, {"none"}},
           {"inspect nothing", 3, {"nothing"}},
           {"inspect task/test.txt", 3, {"test.txt"}},
           {"inspect r.toml", 2, {"r.toml:1", "'seed'"}},
           {"inspect bad", 2, {"run.toml"}},
           {"inspect deep", 3, {"report.json"}},
       })
    check_refusal(shop, refusal);
}

TEST_CASE("an architecture is counted without a file, with its merger and its PEFT method") {
  const Workshop shop;
  const auto dense = json_of(shop, "inspect --arch vit_base_patch16_224");
  CHECK(dense["params"] == 86567656);
  CHECK(dense["macs"] == dense["dense_macs"]);
  // PYRA's article (arXiv 2403.09192): 27 840 parameters beside LoRA's 294 912; 0.289 of the MACs.
  const auto merged = json_of(shop, "inspect --arch vit_base_patch16_224 --merge pyra --schedule high --peft lora");
  CHECK(merged["merge"]["trained_elements"] == 27840);
  CHECK(merged["params"] == 86567656 + 27840);
  CHECK(merged["peft"]["trained_elements"] == 294912);
  CHECK(merged["macs"].get<double>() / dense["macs"].get<double>() == Approx(0.289).margin(0.001));
  CHECK(
      json_of(shop, "inspect --arch vit_base_patch16_224 --peft lora --set peft.rank=4")["peft"]["trained_elements"] ==
      147456);
  for (const Refusal& refusal :
       std::vector<Refusal>{{"inspect", 2, {"--arch"}},
                            {"inspect --arch vit_bse_patch16_224", 2, {"vit_base_patch16_224"}},
                            {"inspect model.safetensors --arch vit_base_patch16_224", 2, {"--arch"}},
                            {"inspect --arch vit_base_patch16_224 --merge tome", 2, {"--schedule"}},
                            {"inspect --arch vit_base_patch16_224 --merge tome --schedule hihg", 2, {"hihg"}},
                            {"inspect --arch vit_base_patch16_224 --merge tme --schedule high", 4, {"tome"}},
                            {"inspect --arch vit_base_patch16_224 --peft lra", 4, {"lora"}}})
    check_refusal(shop, refusal);
}
