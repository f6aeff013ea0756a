"""Reads what pyractl wrote with the libraries it is meant for, by hand: the adapter beside the base model has to give
the logits of the merged model. Needs what make.py needs; hf4 adapters need transformers below 5, hf ones 5.

    pyractl merge-lora RUN --out merged.safetensors --format timm
    python check.py timm BASE.safetensors RUN/adapter merged.safetensors      (or what --format peft wrote)
    pyractl merge-lora RUN --out merged_hf --format hf
    python check.py hf BASE_FOLDER ADAPTER merged_hf                          (--format peft-hf or peft-hf4)
"""
import sys

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file


def timm_model(path, classes=None):
    from timm.models.vision_transformer import VisionTransformer
    weights = load_file(path)
    with safe_open(path, "pt") as file:
        heads = int(file.metadata()["num_heads"])
    dim, patch = weights["patch_embed.proj.weight"].shape[0], weights["patch_embed.proj.weight"].shape[-1]
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    model = VisionTransformer(img_size=side * patch, patch_size=patch, embed_dim=dim, num_heads=heads,
                              depth=len([key for key in weights if key.endswith("attn.qkv.weight")]),
                              mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / dim,
                              num_classes=weights["head.weight"].shape[0])
    model.load_state_dict(weights)
    if classes:
        model.reset_classifier(classes)
    return model.eval(), side * patch


def hf_model(path, classes=None):
    from transformers import AutoConfig, DeiTForImageClassificationWithTeacher, ViTForImageClassification
    config = AutoConfig.from_pretrained(path)
    kind = DeiTForImageClassificationWithTeacher if config.model_type == "deit" else ViTForImageClassification
    options = dict(num_labels=classes, ignore_mismatched_sizes=True) if classes else {}
    return kind.from_pretrained(path, **options).eval(), config.image_size


def main(library, base, adapter, merged):
    load = timm_model if library == "timm" else hf_model
    whole, side = load(merged)
    images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(images)
        classes = getattr(expected, "logits", expected).shape[1]
        got = PeftModel.from_pretrained(load(base, classes)[0], adapter).eval().base_model(images)
    expected, got = (getattr(value, "logits", value) for value in (expected, got))
    difference = (expected - got).abs().max().item()
    print(f"largest difference {difference:.2e} of logits up to {expected.abs().max().item():.2f}")
    return 0 if difference <= 1e-5 * max(1, expected.abs().max().item()) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
