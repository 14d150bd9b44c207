"""nanoGPT's published design in PyTorch, as a stand-in: karpathy/nanoGPT, model.py, train.py and bench.py.

Written from its architecture, not copied. bench.py was read at commit 1eaceae1931d79c248e441b7544efab8fa492523, which
gives the training step; model.py at 0011cd4442915c844e9b8f5c5117f25f5a7096c5 with the options that were added there
switched off, which leaves upstream's model: learned positions, pre-norm blocks, one joint matrix for queries, keys and
values, scaled_dot_product_attention (flash where PyTorch has it), exact GELU, no biases, no dropout, the output tied to
the embedding; std .02, of the matrices that write to the stream .02 / sqrt(2 L). AdamW with decay on matrices and
tables, fused on CUDA only; the gradient clipped to a norm of 1; mixed precision by autocast on CUDA only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """Of a model: width, layers, heads, positions, vocabulary."""

    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    context: int = 256
    vocab_size: int = 256


class Norm(nn.Module):
    """Layer norm with a scale and no bias."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x normed over its last axis."""
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, s: Sizes):
        super().__init__()
        self.n_heads = s.n_heads
        self.norm_1, self.norm_2 = Norm(s.d_model), Norm(s.d_model)
        self.qkv = nn.Linear(s.d_model, 3 * s.d_model, bias=False)
        self.proj = nn.Linear(s.d_model, s.d_model, bias=False)
        self.up = nn.Linear(s.d_model, 4 * s.d_model, bias=False)
        self.down = nn.Linear(4 * s.d_model, s.d_model, bias=False)

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        """The stream after this block."""
        batch, length, width = x_BxTxD.shape
        joint = self.qkv(self.norm_1(x_BxTxD)).split(width, dim=2)
        heads = (part.view(batch, length, self.n_heads, -1).transpose(1, 2) for part in joint)
        z_BxHxTxK = F.scaled_dot_product_attention(*heads, is_causal=True)
        x_BxTxD = x_BxTxD + self.proj(z_BxHxTxK.transpose(1, 2).contiguous().view(batch, length, width))
        return x_BxTxD + self.down(F.gelu(self.up(self.norm_2(x_BxTxD))))


class GPT(nn.Module):
    """The whole model; `forward` gives the mean loss in nats per token."""

    def __init__(self, s: Sizes):
        super().__init__()
        self.embed = nn.Embedding(s.vocab_size, s.d_model)
        self.position = nn.Embedding(s.context, s.d_model)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.n_layers))
        self.norm = Norm(s.d_model)
        self.unembed = nn.Linear(s.d_model, s.vocab_size, bias=False)
        self.unembed.weight = self.embed.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                writes = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 * ((2 * s.n_layers) ** -0.5 if writes else 1.0))

    def forward(self, input_BxT: Tensor, target_BxT: Tensor) -> Tensor:
        """The mean cross-entropy of the targets."""
        place_T = torch.arange(input_BxT.shape[1], device=input_BxT.device)
        x_BxTxD = self.embed(input_BxT) + self.position(place_T)
        for block in self.blocks:
            x_BxTxD = block(x_BxTxD)
        logits = self.unembed(self.norm(x_BxTxD))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), target_BxT.view(-1))


def batches(train_n: np.ndarray, batch_size: int, context: int, device: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """Draws windows uniformly from the text, on the host, as nanoGPT does: inputs and targets [B, T]."""

    def draw() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(train_n) - context, (batch_size,))
        both = [
            torch.stack([torch.from_numpy(train_n[i + shift : i + shift + context].astype(np.int64)) for i in starts])
            for shift in (0, 1)
        ]
        if device == "cuda":
            both = [x.pin_memory().to(device, non_blocking=True) for x in both]
        return both[0], both[1]

    return draw


@dataclass
class Trainer:
    """A model in training; `step()` does one update and returns its loss."""

    model: nn.Module
    step: Callable[[], float]

    def held_out(self, window_WxT1: np.ndarray) -> float:
        """Mean loss of windows of T + 1 tokens."""
        windows = torch.from_numpy(window_WxT1.astype(np.int64))
        with torch.no_grad():
            sums = [
                len(part) * float(self.model(part[:, :-1].contiguous(), part[:, 1:].contiguous()))
                for part in windows.split(16)
            ]
        return sum(sums) / len(windows)


def trainer(
    s: Sizes,
    train_n: np.ndarray,
    *,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int = 0,
    weight_decay: float = 0.1,
    seed: int = 0,
    compiled: bool = False,
    device: str = "cpu",
) -> Trainer:
    """A fresh model and its training step; linear warm-up, then a constant rate. On CUDA in bfloat16."""
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model: Any = GPT(s).to(device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = {"fused": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), **fused)
    if compiled:
        model = torch.compile(model)
    precision = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()
    draw = batches(train_n, batch_size, s.context, device)
    state = {"step": 0, "batch": draw()}

    def step() -> float:
        state["step"] += 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, state["step"] / max(1, warmup_steps))
        with precision:
            loss = model(*state["batch"])
        state["batch"] = draw()  # while the device works
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Trainer(model, step)
