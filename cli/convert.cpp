// pyractl convert: from a .pth, .npz or other model file to one of ours.
#include "tasks/convert.h"

#include "base/text.h"
#include "command.h"

namespace pyra::cli {
namespace {

std::string channels(const std::vector<double>& values) {
  return cat(values.at(0), " ", values.at(1), " ", values.at(2));
}

void write_report(std::ostream& out, const tasks::ConvertReport& r) {
  out << "model       " << r.out.string() << ": " << (r.arch.empty() ? "vision transformer" : r.arch) << ", "
      << r.image_size << " px, " << r.depth << " blocks of width " << r.embed_dim << ", " << r.num_heads << " heads, ";
  if (r.num_classes == 0) {
    out << "no head\n";
  } else {
    out << r.num_classes << " classes\n";
  }
  out << "from        " << r.source << "\n"
      << "merge       " << r.merge << "\n"
      << "preprocess  " << r.resize << ", mean " << channels(r.mean) << ", std " << channels(r.std)
      << " (if it was trained otherwise: --set preprocess.mean=[...])\n"
      << "parameters  " << grouped(r.parameters) << ", MACs " << grouped(r.macs) << " an image, "
      << grouped(int64_t(r.file_bytes)) << " bytes\n";
}

}  // namespace

void add_convert(CLI::App& root, Session& session) {
  auto options = std::make_shared<tasks::ConvertOptions>();
  CLI::App* command = add_command(root, session, "convert",
                                  "Make a model file of a PyTorch checkpoint (.pth), an .npz or another model");
  command
      ->add_option("FILE", options->file,
                   "torch.save's file, .npz, timm's or ours, or a folder of the Hugging Face hub")
      ->required()
      ->type_name("");
  command->add_option("--out", options->out, "Model file to write")->required()->type_name("MODEL");
  command
      ->add_option("--num-heads", options->num_heads,
                   "Attention heads, where the file does not tell (default: a published model's of that size, else "
                   "64 channels a head)")
      ->type_name("N")
      ->check(CLI::Range(1, 16384));
  command
      ->add_option("--base", options->base,
                   "The model that a checkpoint of PYRA's authors was trained on, if it holds only what was trained")
      ->type_name("MODEL");
  command->footer(R"(
A pickle is read as data, by a process that may use no more memory and time than the file accounts for: names other
than those of tensors are refused (exit 3) and nothing in it is run. --set takes preprocess.mean, .std and .resize.

Examples:
  pyractl convert deit_small_patch16_224-cd65a155.pth --out deit_s.safetensors
  pyractl convert mae_finetuned_vit_base.pth --out mae_b.safetensors
  pyractl convert B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz --out vit_b.safetensors
  pyractl convert best_checkpoint.pth --base vit_b.safetensors --out pyra_b.safetensors)");
  command->callback([options, &session] {
    session.action = [options, &session] {
      options->set = session.globals.set;
      const auto report = tasks::convert(*options, session.plugins(), session.progress());
      session.print(nlohmann::json::parse(to_json(report)), [&](std::ostream& out) { write_report(out, report); });
      return 0;
    };
  });
}

}  // namespace pyra::cli
