"""DeSTSeg in PyTorch, small, for tests/test_destseg.py: `python tests/reference/destseg_reference.py` writes the .npz.

The teacher is left out: its maps are given, and so are the damaged images and the masks. Weights are drawn from their
names, so that they need not be stored; of the trained ones some numbers are.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from drawn import draw
from torch import nn

WIDTH, SIDE, BATCH = 4, 40, 3
GRIDS = ((10, 4), (5, 8), (3, 16))  # side, channels: those of a ResNet-18 of this width at 40 pixels
RATES = {"student": 1e-3, "res": 0.03, "head": 0.04}  # so that float32 suffices, and that all parts change


def conv_norm(inputs: int, width: int, size: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, width, size, stride, size // 2 * dilation, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width))


class Blocks(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int = 1):
        super().__init__()
        self.conv_0_1, self.conv_0_2 = conv_norm(inputs, width, 3, stride), conv_norm(width, width)
        self.conv_1_1, self.conv_1_2 = conv_norm(width, width), conv_norm(width, width)
        if stride != 1 or inputs != width:
            self.shortcut_0 = conv_norm(inputs, width, 1, stride)

    def forward(self, x):
        y = self.conv_0_2(F.relu(self.conv_0_1(x)))
        x = F.relu(y + (self.shortcut_0(x) if hasattr(self, "shortcut_0") else x))
        return F.relu(x + self.conv_1_2(F.relu(self.conv_1_1(x))))


class Student(nn.Module):
    def __init__(self, w: int = WIDTH):
        super().__init__()
        self.stem = conv_norm(3, w, 7, 2)
        self.encoder_0, self.encoder_1 = Blocks(w, w), Blocks(w, 2 * w, 2)
        self.encoder_2, self.encoder_3 = Blocks(2 * w, 4 * w, 2), Blocks(4 * w, 8 * w, 2)
        self.decoder_3, self.decoder_2 = Blocks(8 * w, 8 * w), Blocks(8 * w, 4 * w)
        self.decoder_1, self.decoder_0 = Blocks(4 * w, 2 * w), Blocks(2 * w, w)

    def forward(self, x):
        x1 = self.encoder_0(F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1))
        x2 = self.encoder_1(x1)
        x3 = self.encoder_2(x2)
        y = self.decoder_3(self.encoder_3(x3))
        maps = []
        for like, decoder in ((x3, self.decoder_2), (x2, self.decoder_1), (x1, self.decoder_0)):
            y = decoder(F.interpolate(y, size=like.shape[2:], mode="bilinear"))
            maps.insert(0, y)
        return maps


class Head(nn.Module):
    def __init__(self, w: int = 4 * WIDTH):
        super().__init__()
        self.mean = conv_norm(w, w, 1)
        self.dilated_6, self.dilated_12 = conv_norm(w, w, 3, 1, 6), conv_norm(w, w, 3, 1, 12)
        self.dilated_18 = conv_norm(w, w, 3, 1, 18)
        self.project, self.last = conv_norm(4 * w, w), conv_norm(w, w)
        self.logit = nn.Conv2d(w, 1, 1)

    def forward(self, x):
        mean = F.relu(self.mean(x.mean(dim=(2, 3), keepdim=True))).expand_as(x)
        parts = [mean, *(F.relu(branch(x)) for branch in (self.dilated_6, self.dilated_12, self.dilated_18))]
        x = F.relu(self.last(F.relu(self.project(torch.cat(parts, dim=1)))))
        return torch.sigmoid(self.logit(x))[:, 0]


parts = nn.ModuleDict(
    {"student": Student(), "res": Blocks(sum(c for _, c in GRIDS), 4 * WIDTH), "head": Head()}
)  # nothing is initialised here


def leaves() -> dict[str, torch.Tensor]:
    """The numbers by the names that the JAX code gives them."""
    ends = {"running_mean": "mean", "running_var": "variance"}
    found = {}
    for name, tensor in parts.state_dict().items():
        *path, kind = name.split(".")
        if kind == "num_batches_tracked":
            continue
        collection = "batch_stats" if kind in ends else "params"
        if path[-1] in "01":
            norm = path.pop() == "1"
            kind = ends.get(kind, "bias" if kind == "bias" else "scale" if norm else "kernel")
        else:
            kind = {"weight": "kernel"}.get(kind, kind)
        found["/".join((collection, *path, kind))] = tensor
    return found


def as_ours(name: str, tensor: torch.Tensor) -> np.ndarray:
    """Kernels (C', C, k, k) → (k, k, C, C'), the logit's → (C, 1)."""
    array = tensor.detach().numpy().copy()
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    return array[0, 0] if "logit/kernel" in name else array


def sparse(array: np.ndarray) -> np.ndarray:
    return array.ravel()[:: max(1, array.size // 64)]


def unit(maps):
    return [x / (torch.sqrt((x**2).sum(dim=1, keepdim=True)) + 1e-12) for x in maps]


def student_loss(teacher, student):
    """The release's, a sum over the batch, as if the batch had 32 images."""
    levels = ((1 - (t * s).sum(dim=1)) / s[0, 0].numel() for t, s in zip(teacher, student))
    return sum(level.sum() for level in levels) * 32 / BATCH


def segmentation_loss(probability, mask):
    entropy = F.binary_cross_entropy(probability, mask, reduction="none")
    true = probability * mask + (1 - probability) * (1 - mask)
    return (entropy * (1 - true) ** 4).mean() + F.l1_loss(probability, mask)


def channels_first(array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1))).double()


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, SIDE, SIDE, 3)).astype(np.uint8)
    masks = np.zeros((BATCH, SIDE, SIDE), bool)
    masks[0, 5:22, 3:15], masks[1, 30:33, 10:39] = True, True  # the third image is whole
    teachers = [[rng.gamma(1, size=(BATCH, n, n, c)).astype(np.float32) for n, c in GRIDS] for _ in range(2)]
    stored = {"images": images, "masks": masks}
    stored |= {f"teacher_{phase}_{level}": t for phase in (0, 1) for level, t in enumerate(teachers[phase])}
    units, seen = [unit([channels_first(t) for t in maps]) for maps in teachers], images.astype(np.float32) / 255
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    seen = channels_first((seen - mean) / deviation)
    small = F.interpolate(torch.from_numpy(masks[:, None].astype(np.float32)), size=GRIDS[0][0], mode="bilinear")[:, 0]
    small = (small >= 0.5).double()

    with torch.no_grad():
        for name, tensor in leaves().items():
            value = draw(name, as_ours(name, tensor).shape)
            value = value[None, None] if "logit/kernel" in name else value
            tensor.copy_(torch.from_numpy(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value))

    def segmented(student):
        products = [-t * s for t, s in zip(units[1], unit(student))]
        size = products[0].shape[2:]
        joined = torch.cat([F.interpolate(x, size=size, mode="bilinear") for x in products], dim=1)
        return parts["head"](parts["res"](joined))

    parts.double().eval()  # so that the reference has no rounding errors of its own
    with torch.no_grad():
        student = parts["student"](seen)
        probability = segmented(student)
        full = F.interpolate(probability[:, None], size=SIDE, mode="bilinear").flatten(1)
        stored |= {f"student_{level}": np.moveaxis(x.numpy(), 1, -1) for level, x in enumerate(student)}
        stored["distance"], stored["top-100"] = probability.numpy(), full.topk(100).values.mean(dim=1).numpy()

    options = {"momentum": 0.9, "weight_decay": 1e-4}
    first = torch.optim.SGD(parts["student"].parameters(), lr=RATES["student"], **options)
    groups = [{"params": parts[part].parameters(), "lr": RATES[part]} for part in ("res", "head")]
    second = torch.optim.SGD(groups, lr=1, **options)
    losses = []
    for step in range(4):
        parts.eval()
        optimizer, trained = (first, ("student",)) if step < 2 else (second, ("res", "head"))
        for part in trained:
            parts[part].train()
        if step < 2:
            loss = student_loss(units[0], unit(parts["student"](seen)))
        else:
            with torch.no_grad():
                student = parts["student"](seen)
            loss = segmentation_loss(segmented(student), small)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step in (1, 3):
            ours = {name: sparse(as_ours(name, tensor)) for name, tensor in leaves().items()}
            stored |= {
                f"after_{step + 1}/{name}": value for name, value in ours.items() if name.split("/")[1] in trained
            }
    stored["losses"] = np.float32(losses)
    print(losses, stored["top-100"], small.sum().item())
    stored = {name: x.astype(np.float32) if x.dtype == float else x for name, x in stored.items()}
    np.savez_compressed(Path(__file__).parent / "destseg.npz", **stored)
