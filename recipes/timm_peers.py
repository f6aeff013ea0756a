"""timm's side of the benchmarks: its models with LoRA, and with tokens merged as ToMe and PYRA are published."""

import math

import torch
from torch import nn

LORA_RANK, LORA_DROPOUT = 8, 0.1
# Tokens removed after each block's attention, for 12 or 24 blocks and 197 tokens (arXiv 2403.09192).
SCHEDULES = {
    (12, "low"): (16,) * 11 + (10,),
    (12, "high"): (40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3),
    (24, "low"): (8,) * 23 + (6,),
    (24, "high"): (20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1),
}


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank term beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, LORA_RANK, bias=False)
        self.up = nn.Linear(LORA_RANK, base.out_features, bias=False)
        self.dropout = nn.Dropout(LORA_DROPOUT)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout(x)))


class MergingBlock(nn.Module):
    """A timm block that merges `r` tokens between attention and MLP, as ToMe and PYRA are published (arXiv 2210.09461,
    2403.09192): bipartite matching of the mean keys, proportional attention and, `gated`, PYRA's gate on the tokens merged away."""

    def __init__(self, block, r, gated):
        super().__init__()
        self.block, self.r, self.gated = block, r, gated
        width = block.norm1.normalized_shape[0]
        self.gate_a = nn.Parameter(torch.empty(r, 1).uniform_(-1, 1))
        self.gate_b = nn.Parameter(torch.zeros(1, width))
        self.gate_norm = nn.LayerNorm(width)

    def attend(self, x, size):
        attn = self.block.attn
        batch, tokens, width = x.shape
        qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        logits = (query * attn.scale) @ key.transpose(-2, -1)
        if size is not None:
            logits = logits + size.log()[:, None, None, :, 0]
        mixed = logits.softmax(dim=-1) @ value
        return attn.proj(mixed.transpose(1, 2).reshape(batch, tokens, width)), key.mean(1)

    def match(self, metric):
        """Per image: tokens of the even side that leave, that stay, and the odd token each leaving one joins."""
        with torch.no_grad():
            metric = metric / metric.norm(dim=-1, keepdim=True)
            scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
            scores[:, 0] = -math.inf  # the class token stays
            best, partner = scores.max(dim=-1)
            order = best.argsort(dim=-1, descending=True)
            leaving, staying = order[:, : self.r], order[:, self.r :].sort(dim=-1).values
            return leaving[..., None], staying[..., None], partner.gather(1, leaving)[..., None]

    def merge(self, x, size, metric):
        leaving, staying, joined = self.match(metric)
        width = x.shape[-1]
        if size is None:
            size = torch.ones_like(x[..., :1])

        def reduced(values, modulate):
            even, odd = values[:, ::2], values[:, 1::2]
            columns = values.shape[-1]
            kept = even.gather(1, staying.expand(-1, -1, columns))
            source = even.gather(1, leaving.expand(-1, -1, columns))
            target = joined.expand(-1, -1, columns)
            if modulate:
                source = self.modulated(source, odd.gather(1, target))
            return torch.cat([kept, odd.scatter_add(1, target, source)], dim=1)

        merged, total = reduced(x * size, modulate=self.gated), reduced(size, modulate=False)
        assert merged.shape[-1] == width
        return merged / total, total

    def modulated(self, source, target):
        joint = self.gate_norm(source + target)
        by_channel = 2 * torch.sigmoid(self.gate_a.transpose(0, 1) @ joint)
        by_token = 2 * torch.sigmoid(joint @ self.gate_b.transpose(0, 1)) - 1
        return source + (source * by_channel) * by_token

    def forward(self, x, size):
        attended, metric = self.attend(self.block.norm1(x), size)
        x = x + self.block.drop_path1(attended)
        x, size = self.merge(x, size, metric)
        return x + self.block.drop_path2(self.block.mlp(self.block.norm2(x))), size


class MergingVit(nn.Module):
    """A timm model whose blocks merge: `merger` is "tome" or "pyra"."""

    def __init__(self, model, merger, schedule):
        super().__init__()
        self.model = model
        counts = SCHEDULES[len(model.blocks), schedule]
        self.blocks = nn.ModuleList(MergingBlock(block, r, merger == "pyra") for block, r in zip(model.blocks, counts))
        model.blocks = nn.Sequential()  # they live in self.blocks now

    def forward(self, images):
        x, size = self.model._pos_embed(self.model.patch_embed(images)), None
        for block in self.blocks:
            x, size = block(x, size)
        return self.model.forward_head(self.model.norm(x))
