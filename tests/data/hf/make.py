"""Writes the fixtures beside it, by Hugging Face transformers (5.24.0) itself: tiny ViT and DeiT folders with seeded
weights, inputs and the logits the library gives for them. Needs torch, transformers and safetensors.

    python make.py            writes vit/, vit_sharded/, deit/ and expected.safetensors
    python make.py --check F  compares the folder F (ViT, as pyractl wrote it) with vit/: equal logits to 1e-5
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification

HERE = Path(__file__).parent
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4)
LABELS = {0: "cat", 1: "dog", 2: "an \u00fc"}


def shaken(model):
    """Fresh biases are zero and fresh norms one: a mistake there would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def main():
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    vit = shaken(ViTForImageClassification(ViTConfig(**SIZES, id2label=LABELS, label2id={v: k for k, v in LABELS.items()})))
    deit = shaken(DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES, num_labels=3)))
    with torch.no_grad():
        expected = {"images": images, "vit": vit(images).logits, "deit": deit(images).logits}
    vit.save_pretrained(HERE / "vit")
    vit.save_pretrained(HERE / "vit_sharded", max_shard_size="40KB")
    deit.save_pretrained(HERE / "deit")
    save_file(expected, HERE / "expected.safetensors")


def check(folder):
    expected = load_file(HERE / "expected.safetensors")
    with torch.no_grad():
        got = ViTForImageClassification.from_pretrained(folder).eval()(expected["images"]).logits
    difference = (got - expected["vit"]).abs().max().item()
    print(f"largest difference {difference:.2e}")
    return 0 if difference <= 1e-5 else 1


if __name__ == "__main__":
    sys.exit(check(sys.argv[2]) if sys.argv[1:2] == ["--check"] else main())
