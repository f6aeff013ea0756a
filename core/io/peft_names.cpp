#include "io/peft_names.h"

#include "io/hf_names.h"

namespace pyra::io {

std::vector<std::string> peft_names(const std::string& tensor, const PeftNaming& naming, bool distilled) {
  if (naming.names == PeftNames::timm) return {tensor};
  const HfSpelling spelling = naming.names == PeftNames::hf ? HfSpelling::modules : HfSpelling::on_disk;
  std::vector<std::string> names = hf_names(tensor, naming.model, distilled, spelling);
  const std::string prefix = naming.model + ".";
  if (naming.bare)
    for (std::string& name : names)
      if (name.starts_with(prefix)) name.erase(0, prefix.size());
  return names;
}

std::vector<PeftNaming> peft_namings(const nn::VitConfig& config) {
  std::vector<PeftNaming> namings{{}};
  if (config.pool == nn::Pool::avg || config.registers > 0) return namings;  // transformers' ViT has neither
  for (const PeftNames names : {PeftNames::hf, PeftNames::hf4})
    for (const bool bare : {false, true}) {
      namings.push_back({names, "deit", bare});
      if (!config.distilled) namings.push_back({names, "vit", bare});
    }
  return namings;
}

const char* library_of(PeftNames names) {
  switch (names) {
    case PeftNames::timm:
      return "timm";
    case PeftNames::hf:
      return "transformers 5";
    case PeftNames::hf4:
      return "transformers 4";
  }
  return "";
}

}  // namespace pyra::io
