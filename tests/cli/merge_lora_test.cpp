#include "tasks/merge_lora.h"
#include "fixtures.h"

using namespace pyra;
using namespace pyra::test;
namespace fs = std::filesystem;

TEST_CASE("an adapter that peft wrote becomes a model that runs", "[cli]") {
  const Workshop shop;
  const fs::path data = PYRA_TEST_DATA;
  const std::string base = (data / "hf/vit").string(), adapter = (data / "peft/hf_qv").string();
  const auto report = json_of(shop, cat("merge-lora ", adapter, " --model ", base, " --out tuned.safetensors"));
  CHECK(report.at("peft") == "lora");
  CHECK(report.at("verification").at("relative") < tasks::kVerifyTolerance);
  CHECK(json_of(shop, "inspect tuned.safetensors").at("num_classes") == 4);
  CHECK(in(shop, "predict tuned.safetensors task/images/0.ppm --quiet").exit_code == 0);
  const RunResult human = in(shop, cat("merge-lora ", adapter, " --model ", base, " --out again.safetensors"));
  CHECK(human.exit_code == 0);
  CHECK(human.out.find("lora merged") != std::string::npos);
  CHECK(human.err.find("4 classes") != std::string::npos);
  CHECK(read_bytes(shop / "again.safetensors") == read_bytes(shop / "tuned.safetensors"));
}

TEST_CASE("adapters that are not read leave with a reason and no file", "[cli]") {
  const Workshop shop;
  const fs::path data = PYRA_TEST_DATA;
  fs::copy(data / "peft/hf_qv", shop / "dora");
  auto config = nlohmann::json::parse(read_bytes(shop / "dora/adapter_config.json"));
  config["use_dora"] = true;
  write_bytes(shop / "dora/adapter_config.json", config.dump());
  fs::copy(data / "peft/hf_qv", shop / "old");
  fs::rename(shop / "old/adapter_model.safetensors", shop / "old/adapter_model.bin");
  const std::string base = cat(" --model ", (data / "hf/vit").string()), out = " --out x.safetensors";
  check_refusal(shop, {"merge-lora dora" + base + out, 3, {"dora/adapter_config.json", "use_dora", "DoRA"}});
  check_refusal(shop, {"merge-lora old" + base + out, 3, {"adapter_model.bin", "pickle", "save_pretrained"}});
  check_refusal(shop, {"merge-lora dora" + out, 2, {"dora", "--model"}});
  check_refusal(shop, {"merge-lora task" + base + out, 3, {"task", "adapter_config.json"}});
  check_refusal(shop, {cat("merge-lora ", (data / "peft/hf_qv").string(), " --model model.safetensors", out),
                       3,
                       {"layers.2.attention.q_proj", "target_modules"}});
}
