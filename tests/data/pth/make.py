"""Writes the fixtures beside it, by torch.save itself (torch 2.11.0, timm 1.0.31): tiny seeded ViTs in the shapes that
checkpoints come in, and the logits that timm's own classes give for them. Needs torch, timm and safetensors.

    python make.py
"""
import argparse
import pathlib
from collections import OrderedDict

import torch
from safetensors.torch import load_file, save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

HERE = pathlib.Path(__file__).parent
SIZES = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, num_classes=5)
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
EXPECTED = {"images": IMAGES}


def shaken(model, seed=0):
    """Fresh biases are zero and fresh norms one: a mistake there would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.dim() == 1))
    return model.eval()


def expect(name, model, state=None):
    if state is not None:
        model.load_state_dict(state)
    with torch.no_grad():
        EXPECTED[name] = model.eval()(IMAGES)


def save(name, what, **options):
    torch.save(what, HERE / name, **options)


def main():
    vit = shaken(VisionTransformer(**SIZES))
    state = vit.state_dict()
    expect("vit", vit)
    save("vit_zip.pth", state)
    save("vit_legacy.pth", state, _use_new_zipfile_serialization=False)
    # As training programs leave it: DataParallel's names, arguments, an optimizer, parameters instead of tensors.
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    arguments = argparse.Namespace(model="deit_of_no_known_size", lr=1e-3, output_dir=pathlib.PosixPath("runs"), sizes={1, 2})
    parallel = OrderedDict((f"module.{k}", torch.nn.Parameter(v)) for k, v in state.items())
    save("vit_wrapped.pth", {"model": parallel, "optimizer": optimizer.state_dict(), "epoch": 3, "args": arguments})
    other = {k: v + 1 for k, v in state.items() if "norm" in k}
    save("vit_ema.pth", {"arch": "vit_tiny", "state_dict": other, "state_dict_ema": state, "metric": None}, pickle_protocol=4)

    # Tensors that do not fill their storages in order: transposed, a slice of a larger one, two in one.
    views = dict(state)
    views["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].t().contiguous().t()
    views["blocks.1.attn.qkv.weight"] = torch.cat([torch.zeros(5, 16), state["blocks.1.attn.qkv.weight"], torch.ones(3, 16)])[5:53]
    both = torch.cat([state["blocks.0.norm1.weight"], state["blocks.0.norm1.bias"]])
    views["blocks.0.norm1.weight"], views["blocks.0.norm1.bias"] = both[:16], both[16:]
    save("vit_views.pth", views)

    dtypes = {"patch": torch.float16, "blocks.0": torch.bfloat16, "blocks.1": torch.float64}
    mixed = {k: v.to(next((d for p, d in dtypes.items() if k.startswith(p)), torch.float32)) for k, v in state.items()}
    save("vit_dtypes.pth", mixed)
    expect("dtypes", VisionTransformer(**SIZES), {k: v.float() for k, v in mixed.items()})

    deit = shaken(VisionTransformerDistilled(**SIZES), seed=2)
    expect("deit", deit)
    save("deit_distilled.pth", {"model": deit.state_dict()})

    # MAE's two kinds: what its pretraining leaves, decoder and all, and what its fine-tuning does.
    pretraining = {k: v for k, v in state.items() if not k.startswith("head")}
    pretraining |= {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 16), "decoder_embed.bias": torch.zeros(8),
                    "decoder_pos_embed": torch.zeros(1, 17, 8), "decoder_blocks.0.norm1.weight": torch.zeros(8),
                    "decoder_norm.weight": torch.zeros(8), "decoder_pred.bias": torch.zeros(192)}
    save("mae_pretraining.pth", {"model": pretraining})
    tuned = shaken(VisionTransformer(**SIZES, global_pool="avg", fc_norm=True), seed=3)
    expect("mae", tuned)
    save("mae_finetuned.pth", {"model": tuned.state_dict()})

    # What PYRA's authors' program trains, from the numbers of ../goldens/vit_pyra_lora (64 channels, 4 blocks) under
    # that program's names.
    golden = load_file(HERE.parent / "goldens" / "vit_pyra_lora.safetensors")
    trained = {"head.weight": golden["model.head.weight"], "head.bias": golden["model.head.bias"]}
    for name, tensor in golden.items():
        if name.startswith("peft."):
            name = name[5:].replace(".lora_a", ".attn.LoRA_a.weight").replace(".lora_b", ".attn.LoRA_b.weight")
            trained[name] = tensor
    save("pyra_trained.pth", {"model": trained, "args": argparse.Namespace(model="vit_base_patch16_224")})
    save_file(EXPECTED, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
