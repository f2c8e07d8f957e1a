"""Stage 1 in PyTorch, for `python -m llb.bench --against torch`: eager as released, with fused attention, compiled.

    eager      attention forms its (T, T) matrix, as in the released encoder
    fused      torch.nn.functional.scaled_dot_product_attention in its place
    compiled   the same through torch.compile

Written after the papers that llb.encoders.vit and llb.detectors.dinomaly name. Nothing else in llb needs PyTorch.
"""

import math

import numpy as np
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional

from llb.bench import reference
from llb.bench.common import Stage, Way, difference
from llb.detectors.common import TOP_FRACTION
from llb.detectors.decoder import ATTENTION_EPS, Dinomaly
from llb.detectors.dinomaly import MAP
from llb.encoders.specs import Spec
from llb.encoders.vit import interpolate_positions
from llb.images import IMAGENET_MEAN, IMAGENET_STD


class Attention(nn.Module):
    """Softmax attention, explicit or fused, or Dinomaly's linear attention: (B, T, D) → (B, T, D)."""

    def __init__(self, width: int, heads: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D/H)
        if self.kind == "linear":
            q, k = functional.elu(q) + 1, functional.elu(k) + 1
            normaliser = q @ k.sum(dim=-2, keepdim=True).mT + ATTENTION_EPS  # (B, H, T, 1)
            x = q @ (k.mT @ v) / normaliser
        elif self.kind == "fused":
            x = functional.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """D → 4 D → D, with dropout before, between and after."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(functional.gelu(self.fc1(self.drop(x))))))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, kind: str, eps: float, layer_scale: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn, self.mlp = Attention(width, heads, kind), Mlp(width)
        if layer_scale:
            self.ls1, self.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.layer_scale = layer_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.attn(self.norm1(x))
        x = x + (self.ls1 * a if self.layer_scale else a)
        m = self.mlp(self.norm2(x))
        return x + (self.ls2 * m if self.layer_scale else m)


class Encoder(nn.Module):
    """uint8 (B, S, S, 3) → float32 (B, 2, T, D), the means of the two groups of blocks; without the later blocks."""

    def __init__(self, spec: Spec, size: int, kind: str) -> None:
        super().__init__()
        self.spec, patches = spec, (size // spec.patch) ** 2
        self.patch_embed = nn.Conv2d(3, spec.width, spec.patch, spec.patch)
        self.pos_embed = nn.Parameter(torch.zeros(1 + patches, spec.width))  # interpolated beforehand
        self.leading = nn.Parameter(torch.zeros(1 + spec.registers, spec.width))  # class and registers
        count = max(map(max, spec.groups)) + 1
        self.blocks = nn.ModuleList(Block(spec.width, spec.heads, kind, 1e-6, spec.layer_scale) for _ in range(count))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        x = self.patch_embed(x).flatten(2).mT + self.pos_embed[1:]
        leading = self.leading + functional.pad(self.pos_embed[:1], (0, 0, 0, self.spec.registers))
        x = torch.cat([leading.expand(len(x), -1, -1), x], dim=1)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return torch.stack([sum(outputs[i] for i in group) / len(group) for group in self.spec.groups], dim=1)


class Decoder(nn.Module):
    """Dinomaly's bottleneck and decoder: (B, 2, T, D) → (B, 2, P, D)."""

    def __init__(self, width: int, heads: int, depth: int, patches: int, dropout: float) -> None:
        super().__init__()
        self.bottleneck, self.patches = Mlp(width, dropout), patches
        self.blocks = nn.ModuleList(Block(width, heads, "linear", 1e-8) for _ in range(depth))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x, outputs = self.bottleneck(features.mean(dim=1)), []
        for block in self.blocks:
            x = block(x)
            outputs.append(x[:, -self.patches :])
        half = len(outputs) // 2
        return torch.stack([sum(outputs[half:]) / half, sum(outputs[:half]) / half], dim=1)


def loss_of(decoded: torch.Tensor, target: torch.Tensor, hard: int, factor: float) -> torch.Tensor:
    """Global cosine loss; a hook multiplies the gradient at easy positions, as in the released code."""
    losses = []
    for a, b in zip(decoded.unbind(1), target.unbind(1)):
        with torch.no_grad():
            here = 1 - functional.cosine_similarity(a, b, dim=-1)
            easy = here < here.flatten().topk(hard).values[-1]
        a = a.clone()
        a.register_hook(lambda gradient, easy=easy: torch.where(easy[..., None], gradient * factor, gradient))
        losses.append((1 - functional.cosine_similarity(a.flatten(1), b.flatten(1), dim=-1)).mean())
    return sum(losses) / 2


class StableAdamW(torch.optim.Optimizer):
    """AdamW with AMSGrad, its step bounded in each tensor (Wortsman et al., NeurIPS 2023), as Dinomaly trains."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-10, "decay": 1e-4})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            (b1, b2), rate = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p), "top": torch.zeros_like(p)}
                state["step"] += 1
                state["m"].lerp_(p.grad, 1 - b1)
                state["v"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                torch.maximum(state["top"], state["v"], out=state["top"])
                d = (state["top"].sqrt() / math.sqrt(1 - b2 ** state["step"])).add_(group["eps"])
                excess = max(1.0, (p.grad / d).square_().mean().sqrt_().item())
                p.mul_(1 - rate * group["decay"])
                p.addcdiv_(state["m"], d, value=-rate / (1 - b1 ** state["step"]) / excess)


# ---- llb's weights ----


def copy_linear(layer: nn.Linear, p: dict) -> None:
    p = p.get("dense", p)
    layer.weight.data.copy_(torch.tensor(np.asarray(p["kernel"]).T))
    layer.bias.data.copy_(torch.tensor(np.asarray(p["bias"])))


def copy_mlp(module: Mlp, p: dict) -> None:
    copy_linear(module.fc1, p["fc1"])
    copy_linear(module.fc2, p["fc2"])


def copy_block(block: Block, p: dict) -> None:
    for norm, name in ((block.norm1, "norm1"), (block.norm2, "norm2")):
        norm.weight.data.copy_(torch.tensor(np.asarray(p[name]["scale"])))
        norm.bias.data.copy_(torch.tensor(np.asarray(p[name]["bias"])))
    copy_linear(block.attn.qkv, p["attn"]["qkv"])
    copy_linear(block.attn.proj, p["attn"]["proj"])
    copy_mlp(block.mlp, p["mlp"])
    if block.layer_scale:
        block.ls1.data.copy_(torch.tensor(np.asarray(p["ls1"])))
        block.ls2.data.copy_(torch.tensor(np.asarray(p["ls2"])))


def make_encoder(params: dict, spec: Spec, size: int, kind: str) -> Encoder:
    encoder, side = Encoder(spec, size, kind), size // spec.patch
    kernel = np.asarray(params["patch_embed"]["kernel"])  # (p, p, 3, D)
    encoder.patch_embed.weight.data.copy_(torch.tensor(kernel.transpose(3, 2, 0, 1)))
    encoder.patch_embed.bias.data.copy_(torch.tensor(np.asarray(params["patch_embed"]["bias"])))
    positions = np.asarray(interpolate_positions(params["pos_embed"], side, side, spec))
    encoder.pos_embed.data.copy_(torch.tensor(positions))
    leading = [np.atleast_2d(params[name]) for name in ("cls_token", "register_tokens") if name in params]
    encoder.leading.data.copy_(torch.tensor(np.concatenate(leading)))
    for index, block in enumerate(encoder.blocks):
        copy_block(block, params[f"block_{index}"])
    return encoder.eval().requires_grad_(False)


def make_decoder(params: dict, model: Dinomaly, width: int) -> Decoder:
    """model: for its sizes."""
    decoder = Decoder(width, model.heads, model.depth, model.patches, model.dropout)
    copy_mlp(decoder.bottleneck, params["bottleneck"])
    for index, block in enumerate(decoder.blocks):
        copy_block(block, params[f"block_{index}"])
    return decoder


# ---- stage 1, as released: encoder in every step and pass, one sub-model after the other ----


def heat_maps(distance: torch.Tensor, size: int) -> np.ndarray:
    """float32 (B, 2, P) → (B, size, size): upsampled together, blurred by SciPy image by image."""
    side = math.isqrt(distance.shape[-1])
    maps = functional.interpolate(distance.unflatten(2, (side, side)), size, mode="bilinear", align_corners=True)
    return np.stack([ndimage.gaussian_filter(heat, MAP.sigma) for heat in maps.mean(dim=1).cpu().numpy()])


def scores_of(distance: torch.Tensor, size: int) -> np.ndarray:
    maps = heat_maps(distance, size).reshape(len(distance), -1)
    return np.sort(maps, axis=1)[:, -max(1, int(maps.shape[1] * TOP_FRACTION)) :].mean(axis=1)


class Stage1:
    """Steps and scores of ONE sub-model; each of the K costs the same.

    kind: eager, fused or compiled.
    """

    def __init__(self, stage: Stage, kind: str, device: str = "cpu") -> None:
        self.stage, self.device, spec, size = stage, device, stage.setup.spec, stage.setup.image_size
        attention = "explicit" if kind == "eager" else "fused"
        self.encoder = make_encoder(stage.encoder.params, spec, size, attention).to(device)
        self.decoder = make_decoder(stage.params[0], stage.model, spec.width).to(device)
        compiled = torch.compile if kind == "compiled" else lambda module: module
        self.encode, self.decode = compiled(self.encoder), compiled(self.decoder)
        self.random = np.random.default_rng(0)

    @torch.no_grad()
    def features(self, indices: np.ndarray) -> torch.Tensor:
        return self.encode(torch.from_numpy(self.stage.images[indices]).to(self.device))

    def targets(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :, -self.stage.model.patches :]

    @torch.no_grad()
    def distances(self, indices: np.ndarray) -> torch.Tensor:
        self.decoder.eval()
        features = self.features(indices)
        return 1 - functional.cosine_similarity(self.decode(features), self.targets(features), dim=-1)

    def score(self, indices: np.ndarray) -> np.ndarray:
        return scores_of(self.distances(indices), self.stage.setup.image_size)

    def train(self, steps: int) -> None:
        """Continue from the present weights, with a new optimiser."""
        setup, recipe, hard = self.stage.setup, self.stage.recipe, self.stage.hard
        self.decoder.train()
        optimizer = StableAdamW(self.decoder.parameters(), setup.learning_rate)
        for _ in range(steps):
            features = self.features(self.random.choice(self.stage.subsets[0], setup.batch_size))
            loss = loss_of(self.decode(features), self.targets(features), hard, recipe.easy_factor)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.decoder.parameters(), recipe.clip_norm)
            optimizer.step()
            loss.item()  # for the log, as released


def stage1_ways(stage: Stage, name: str) -> tuple[dict[str, Way], dict[str, float]]:
    """The ways of `name`, one of TORCH, timed on one sub-model, and how far its results are from the reference's."""
    encoder, setup, count = stage.encoder, stage.setup, len(stage.subsets)
    stage1 = Stage1(stage, name.split()[1])
    batch = np.arange(setup.batch_size) % len(stage.images)
    images = stage.images[batch]
    features = reference.compiled_encode(encoder.params, images, spec=setup.spec)
    distances = reference.distances(encoder.params, stage.params[0], images, setup=setup)
    differences = {
        "features": difference(stage1.features(batch), features),
        "distances": difference(stage1.distances(batch), distances),
    }
    ways = {
        "encoder": Way(lambda: [stage1.features(batch) for _ in range(2)], 2 * len(batch)),
        "training step": Way(lambda: stage1.train(2), 2 / count, lambda: stage1.train(1)),
        "scoring": Way(lambda: [stage1.score(batch) for _ in range(2)], 2 * len(batch) / count),
    }
    return ways, differences
