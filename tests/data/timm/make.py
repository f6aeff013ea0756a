"""Writes this folder's fixtures: tiny models of families that timm knows, saved by safetensors, and timm's logits.

    python tests/data/timm/make.py          (timm 1.0.31, torch 2.11, safetensors)

Each NAME.safetensors holds the model as people save it; NAME_expected.safetensors an input and timm's logits. With
`--read FILE` a file that pyractl wrote in timm's format is loaded, strictly, into the same architecture and compared.
"""
import argparse
import pathlib

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from timm.models.vision_transformer import VisionTransformer

HERE = pathlib.Path(__file__).parent
COMMON = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=3)
FAMILIES = {
    "dinov2": dict(init_values=1e-1),
    "dinov2_reg": dict(init_values=1e-1, reg_tokens=4, no_embed_class=True),
    "registers": dict(reg_tokens=3),
    "deit3": dict(init_values=1e-1, no_embed_class=True),
}


def build(name):
    return VisionTransformer(**COMMON, **FAMILIES[name]).eval()


def make(name):
    torch.manual_seed(list(FAMILIES).index(name))
    model = build(name)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.3 + ("norm" in key and key.endswith("weight")))
    images = torch.randn(2, 3, 32, 32)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    if name == "deit3":  # as the authors' own files spell it
        tensors = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
                   for key, value in tensors.items()}
    save_file(tensors, HERE / f"{name}.safetensors", metadata={"format": "pt", "num_heads": "2"})
    with torch.no_grad():
        save_file({"images": images, "logits": model(images)}, HERE / f"{name}_expected.safetensors")


def make_hub_folder():
    """As a model of timm lies on the Hugging Face hub: heads and statistics stand in config.json alone."""
    torch.manual_seed(len(FAMILIES))
    model = timm.create_model("deit_tiny_patch16_224", **COMMON).eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.3 + ("norm" in key and key.endswith("weight")))
    images = torch.randn(2, 3, 32, 32)
    save_for_hf(model, HERE / "hub", model_config={"label_names": ["a", "b", "c"]}, model_args=COMMON,
                safe_serialization=True)  # fmt: skip
    with torch.no_grad():
        save_file({"images": images, "logits": model(images)}, HERE / "hub_expected.safetensors")


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--read", nargs=2, metavar=("NAME", "FILE"))
arguments = parser.parse_args()
if arguments.read:
    name, file = arguments.read
    model = build(name)
    model.load_state_dict(load_file(file))
    expected = load_file(HERE / f"{name}_expected.safetensors")
    with torch.no_grad():
        print("largest difference", (model(expected["images"]) - expected["logits"]).abs().max().item())
else:
    for name in FAMILIES:
        make(name)
    make_hub_folder()
