"""Writes the fixtures beside it, by NumPy itself (2.4.6): one tiny seeded ViT in each layout of Google's .npz files, and
the logits of timm's VisionTransformer (1.0.31) after timm's own loader read them. Needs torch, timm, numpy, safetensors.

    python make.py
"""
import pathlib
import tempfile

import numpy as np
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

HERE = pathlib.Path(__file__).parent
C, H, P, K, DEPTH, MLP = 16, 2, 8, 5, 2, 32
SIZES = dict(img_size=32, patch_size=P, embed_dim=C, depth=DEPTH, num_heads=H, mlp_ratio=2, num_classes=K)
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def arrays(positions, attention, norm2, mlp, seed):
    """Flax's names and shapes, random numbers."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: random.normal(0, 0.2, shape).astype(np.float32)
    norm = lambda at: {f"{at}/scale": 1 + draw(C), f"{at}/bias": draw(C)}
    found = {"embedding/kernel": draw(P, P, 3, C), "embedding/bias": draw(C), "cls": draw(1, 1, C),
             positions: draw(1, 17, C), "head/kernel": draw(C, K), "head/bias": draw(K), **norm("Transformer/encoder_norm")}
    for n in range(DEPTH):
        at = f"Transformer/encoderblock_{n}"
        found |= norm(f"{at}/LayerNorm_0") | norm(f"{at}/{norm2}")
        for part in ("query", "key", "value"):
            found |= {f"{at}/{attention}/{part}/kernel": draw(C, H, C // H), f"{at}/{attention}/{part}/bias": draw(H, C // H)}
        found |= {f"{at}/{attention}/out/kernel": draw(H, C // H, C), f"{at}/{attention}/out/bias": draw(C)}
        found |= {f"{at}/{mlp}/Dense_0/kernel": draw(C, MLP), f"{at}/{mlp}/Dense_0/bias": draw(MLP)}
        found |= {f"{at}/{mlp}/Dense_1/kernel": draw(MLP, C), f"{at}/{mlp}/Dense_1/bias": draw(C)}
    return found


def logits(found):
    """By timm's loader, which knows neither bfloat16 words nor half precision: it is given the same numbers as f4."""
    model = VisionTransformer(**SIZES)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/m.npz", **{k: v.astype(np.float32) for k, v in found.items()})
        model.load_pretrained(f"{folder}/m.npz")
    with torch.no_grad():
        return model.eval()(IMAGES)


def bfloat16_words(array):
    return torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy().view("V2")


def rounded(array):
    return torch.from_numpy(array).to(torch.bfloat16).float().numpy()


def main():
    old = ("Transformer/posembed_input/pos_embedding", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
    new = ("pos_embedding", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
    expected = {"images": IMAGES}

    plain = arrays(*old, seed=0)
    expected["augreg"] = logits(plain)
    np.savez(HERE / "augreg.npz", **plain)

    # With what a training state holds beside the weights, the layer that timm drops, and arrays in Fortran order.
    target = {f"opt/target/{k}": np.asfortranarray(v.astype(np.float64)) for k, v in arrays(*old, seed=1).items()}
    expected["target"] = logits(target)
    target |= {"opt/state/step": np.int64(7), "opt/target/pre_logits/kernel": np.ones((C, C), np.float32),
               "opt/target/pre_logits/bias": np.ones(C, np.float32)}
    np.savez_compressed(HERE / "opt_target.npz", **target)

    big = {f"params/{k}": v.astype(np.float16) for k, v in arrays(*new, seed=2).items()}
    expected["big_vision"] = logits(big)
    np.savez(HERE / "big_vision.npz", **big)

    stacked, blocks = {}, {}
    for name, array in arrays(*new, seed=3).items():
        if "encoderblock_" in name:
            blocks.setdefault("params/Transformer/encoderblock/" + name.split("/", 2)[2], []).append(array)
        else:
            stacked["params/" + name] = array
    stacked |= {name: np.stack(parts) for name, parts in blocks.items()}
    expected["stacked"] = logits({k: rounded(v) for k, v in stacked.items()})
    np.savez(HERE / "big_vision_stacked.npz", **{k: bfloat16_words(v) for k, v in stacked.items()})

    # 8 MB of zeros in 8 kB: what a bomb looks like, only smaller.
    np.savez_compressed(HERE / "bomb.npz", **{"embedding/kernel": np.zeros(2_000_000, np.float32)})
    save_file(expected, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
