// pyractl merge-lora: from a run folder or an adapter to one verified model file, or to an adapter for others.
#include "tasks/merge_lora.h"

#include "base/text.h"
#include "command.h"

namespace pyra::cli {
namespace {

void write_report(std::ostream& out, const tasks::MergeLoraReport& r) {
  const bool adapter = r.format.starts_with("peft");
  out << (adapter ? "adapter     " : "model       ") << r.out.string() << " (" << r.format << "): " << r.arch << ", "
      << r.merge << ", " << r.peft << (adapter ? "\n" : " merged\n") << "parameters  " << grouped(r.parameters)
      << ", MACs " << grouped(r.macs) << " an image, " << grouped(int64_t(r.file_bytes)) << " bytes\n"
      << "verified    read back and run on " << r.verification.images << " images: logits differ by "
      << r.verification.relative() << " of the largest (allowed " << tasks::kVerifyTolerance << ")\n";
}

}  // namespace

void add_merge_lora(CLI::App& root, Session& session) {
  auto options = std::make_shared<tasks::MergeLoraOptions>();
  CLI::App* command =
      add_command(root, session, "merge-lora", "Write a tuned model as one file, its PEFT method merged and verified");
  command->add_option("RUN", options->run, "Run folder of `pyractl finetune`, or adapter folder of peft")
      ->required()
      ->type_name("");
  command->add_option("--model", options->model, "The base model of an adapter folder")->type_name("BASE");
  command->add_option("--out", options->out, "Model file, or folder, to write")->required()->type_name("MODEL");
  command
      ->add_option("--format", options->format,
                   "pyra, timm, or hf: a folder for transformers; peft, peft-hf or peft-hf4: the LoRA alone")
      ->type_name("F")
      ->capture_default_str();
  command->add_flag("--drop-merge", options->drop_merge,
                    "Leave the merger out (timm's and Hugging Face's formats cannot carry one)");
  command->footer(R"(
The weights are merged in fp32, written, read back and run on seeded noise beside the tuned model. Exits with 7, and
leaves no file, when a logit differs by more than 1e-4 of the largest.

An adapter folder is what Hugging Face peft writes for LoRA on a ViT of timm or transformers (adapter_config.json and
adapter_model.safetensors), or adapter/ of a run. --format peft, peft-hf and peft-hf4 write a run's LoRA as such a
folder, not merged: for timm's model, transformers 5's or transformers 4's, which name their layers differently.

Examples:
  pyractl merge-lora runs/first --out tuned.safetensors
  pyractl merge-lora runs/first --out tuned_timm.safetensors --format timm --drop-merge
  pyractl merge-lora runs/first --out tuned_hf --format hf --drop-merge
  pyractl merge-lora peft_adapter --model vit.safetensors --out tuned.safetensors
  pyractl merge-lora runs/first --out adapter_hf --format peft-hf --drop-merge)");
  command->callback([options, &session] {
    session.action = [options, &session] {
      const auto report = tasks::merge_lora(*options, session.plugins(), session.progress());
      session.print(nlohmann::json::parse(to_json(report)), [&](std::ostream& out) { write_report(out, report); });
      return 0;
    };
  });
}

}  // namespace pyra::cli
