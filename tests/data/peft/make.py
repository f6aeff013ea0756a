"""Writes the adapters beside it, by Hugging Face peft itself, on tiny ViTs of timm and transformers: seeded, shaken so
that no tensor is zero, each folder with the logits (expected.safetensors) that peft gives on the images of
../hf/expected.safetensors. Needs torch, timm, peft, transformers and safetensors.

    python make.py timm   timm_base.safetensors and timm_*/          (peft 0.21.2, timm 1.0.31)
    python make.py hf     hf_*/, deit_*/ on ../hf/vit and ../hf/deit  (peft 0.21.2, transformers 5.24.0)
    python make.py hf4    hf4_*/ on ../hf/vit                         (peft 0.21.2, transformers 4.57.6)
"""
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
BASE = HERE / "timm_base.safetensors"


def images():
    return load_file(HERE.parent / "hf" / "expected.safetensors")["images"]


def timm_model(classes):
    from timm.models.vision_transformer import VisionTransformer
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, mlp_ratio=1.5, num_classes=5)
    if BASE.exists():
        model.load_state_dict(load_file(BASE))
    if classes != 5:
        model.reset_classifier(classes)
    return model


def hf_model(name, classes):
    from transformers import DeiTForImageClassificationWithTeacher, ViTForImageClassification
    kind = DeiTForImageClassificationWithTeacher if name == "deit" else ViTForImageClassification
    return kind.from_pretrained(HERE.parent / "hf" / name, num_labels=classes, ignore_mismatched_sizes=True)


def shake(parameters, size):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def write(name, model, dtype=None, base="timm_base", **options):
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(**options))
    shake((p for p in tuned.parameters() if p.requires_grad), 0.2)
    if dtype:  # what the file holds is what the logits are of
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter.to(dtype).float())
    tuned.eval()
    folder = HERE / name
    with torch.no_grad():
        logits = tuned.base_model(images())
    tuned.peft_config["default"].base_model_name_or_path = base
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    if dtype:
        file = folder / "adapter_model.safetensors"
        save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file, {"format": "pt"})
    save_file({"logits": getattr(logits, "logits", logits).contiguous()}, folder / "expected.safetensors")


def timm():
    model = timm_model(5)
    if not BASE.exists():
        torch.manual_seed(0)
        shake(model.parameters(), 0.1)
        save_file(model.state_dict(), BASE, {"architecture": "tiny", "num_heads": "2"})
    write("timm_qkv", timm_model(3), r=4, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"])
    # "proj" is the end of the patch embedding's name too, which is a convolution.
    write("timm_bias_all", timm_model(3), r=2, lora_alpha=3, target_modules=["qkv", "proj"], bias="all",
          modules_to_save=["head"])
    write("timm_patterns", timm_model(5), r=4, lora_alpha=6, use_rslora=True, lora_bias=True,
          target_modules=r"blocks\.\d+\.(attn\.qkv|mlp\.fc[12])", rank_pattern={"blocks.0.attn.qkv": 2, "fc1": 3},
          alpha_pattern={r"blocks\.1\.mlp\.fc2": 5, "qkv": 2})
    write("timm_lora_only", timm_model(5), dtype=torch.bfloat16, r=2, lora_alpha=4, fan_in_fan_out=True,
          target_modules=["fc1", "fc2", "head"], exclude_modules=["blocks.1.mlp.fc1"], bias="lora_only")


def hf():
    write("hf_qv", hf_model("vit", 4), base="hf/vit", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"],
          modules_to_save=["classifier"])
    write("hf_all_linear", hf_model("vit", 3), base="hf/vit", r=2, lora_alpha=3, target_modules="all-linear",
          bias="all")
    write("hf_layers", hf_model("vit", 3), base="hf/vit", r=2, lora_alpha=4,
          target_modules=["k_proj", "fc2"], layers_to_transform=[1], layers_pattern="layers", task_type="SEQ_CLS", rank_pattern={"k_proj": 3})
    write("deit_qv", hf_model("deit", 3), base="hf/deit", r=2, lora_alpha=4,
          target_modules=["q_proj", "v_proj", "o_proj"], modules_to_save=["cls_classifier", "distillation_classifier"])


def hf4():
    write("hf4_qv", hf_model("vit", 4), base="hf/vit", r=4, lora_alpha=8, target_modules=["query", "value"],
          modules_to_save=["classifier"])
    # Both attention.output.dense and the MLP's output.dense end so.
    write("hf4_dense", hf_model("vit", 3), base="hf/vit", r=2, lora_alpha=4,
          target_modules=["output.dense", "key"], bias="lora_only")


if __name__ == "__main__":
    {"timm": timm, "hf": hf, "hf4": hf4}[sys.argv[1]]()
