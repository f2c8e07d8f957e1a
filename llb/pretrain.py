"""Pre-train `tiny`, the embedded encoder, on images that llb.textures draws. No photograph is involved.

    python -m llb.pretrain --export llb/weights/tiny.safetensors      about 9 minutes on two cores

A small ViT sees the filter-bank energies (llb.stem) of some patches and learns to say something of the hidden ones, so
it has to learn how structure goes on from patch to patch. What it is asked, its loss, is one of four objectives
(llb.objectives); which kinds of images are drawn, one of three mixes (llb.textures). The energies of an image never
change: they are computed once, when it is drawn, and training is all about the transformer.

    energies   float16 (N, P, 53)   on disk
    batch      float16 (B, P, 53)   one shuffled pass over all images after another
    state      the parameters, AdamW's moments, and where the objective has one its teacher, a moving average

An interrupted run goes on when the same command is given again.
"""

import math
import multiprocessing
import os
import signal
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llb import textures
from llb.checkpoint import check_params, open_checkpoints, restore_params, restore_state, save
from llb.config import LARGEST_SEED, flag, influential, parse, real, whole
from llb.console import choose_device, progress, run, say
from llb.encoder import ViT
from llb.files import read_json, writable_file, write_json
from llb.objectives import OBJECTIVES, PATCHES, SPEC, init
from llb.run import own_folder, refuse_differences
from llb.stem import ENERGIES, energies, normalise
from llb.textures import MIXES
from llb.weights_io import write_tree

DRAW_BATCH = 64  # images per call of the filter bank
SAMPLE = 2000  # images that the energies' mean and deviation are taken over
WHITEN = 512  # images that the features are whitened over
SHRINK = 1e-4  # of the largest variance, added to all; between 1e-2 and 1e-5 smaller was better, down to about here
TEACHER_MOMENTUM = 0.99  # a step: runs are short
PART = 4  # images: on a CPU a step takes its batch in parts, whose activations stay in the cache (a third faster)
SAVE_SECONDS = 60.0


@dataclass
class Pretrain:
    """Pre-train the embedded encoder on drawn images."""

    out: str = flag("runs/pretrain", "folder for the drawn energies and the checkpoints", affects=False)
    export: str | None = flag(None, "write the encoder's weights to this file at the end", affects=False, shown="none")
    objective: str = flag("energies", "what is learned, see llb/objectives.py", choices=tuple(OBJECTIVES))
    mix: str = flag("six", "which kinds of images are drawn", choices=tuple(MIXES))
    images: int = flag(6000, "number of drawn images", whole(1))
    steps: int = flag(600, "optimiser steps; 0: the weights stay random, to compare with", whole(0))
    batch_size: int = flag(16, "images per step", whole(1))
    learning_rate: float = flag(1.5e-3, "peak learning rate of AdamW", real(0, 1, True))
    seed: int = flag(0, "all random numbers follow from it", whole(0, LARGEST_SEED))


def main() -> None:
    settings = parse(Pretrain)
    say(choose_device())
    out = Path(settings.out)
    own_folder(out)
    if settings.export:
        writable_file(settings.export, "--export")
    config, mend = out / "config.json", "give another --out"
    if config.exists():
        refuse_differences(read_json(config, mend), influential(settings), f"--out {out}", mend)
    else:
        write_json(config, influential(settings))

    known = draw_energies(settings, out / "energies.npy")
    params = pretrain(settings, known, out / "checkpoints")
    params["whitening"] = feature_whitening(params, known[:WHITEN])
    if settings.export:
        about = {name: str(value) for name, value in influential(settings).items()}
        write_tree(params, settings.export, about)
        say(f"written: {settings.export}, {os.path.getsize(settings.export) / 1e6:.1f} MB")


# ---- drawing ----


def draw_image(index: int, seed: int, mix: str) -> np.ndarray:
    """Image `index` of the endless set that belongs to a seed and a mix: uint8 (S, S, 3)."""
    return textures.draw(np.random.default_rng([seed, index]), SPEC.image_size, MIXES[mix])


def draw_energies(settings: Pretrain, file: Path) -> np.ndarray:
    """Draw every image and keep its energies, in `file`: float16 (N, P, E), memory-mapped.

    Worker processes draw, about 70 images a second on two cores. An interrupted drawing goes on behind the last batch
    that is there whole: what is not drawn yet is zero, which a drawn image's energies never are.
    """
    shape = (settings.images, PATCHES, ENERGIES)
    describe = jax.jit(lambda images: energies(normalise(images)))
    if not file.exists():
        unfinished = file.with_suffix(".partial")
        mode = "r+" if unfinished.exists() else "w+"
        array = np.lib.format.open_memmap(unfinished, mode=mode, dtype=np.float16, shape=shape)
        starts = range(0, settings.images, DRAW_BATCH)
        drawn = bisect_left(starts, True, key=lambda start: not array[start : start + DRAW_BATCH][-1, -1].any())
        with closing(draw_images(settings, drawn * DRAW_BATCH)) as images:
            for start in progress(starts[drawn:], desc="drawing", unit="batch", initial=drawn, total=len(starts)):
                batch = list(islice(images, DRAW_BATCH))
                padded = np.resize(batch, (DRAW_BATCH, *batch[0].shape))  # one shape, compiled once
                array[start : start + DRAW_BATCH] = describe(padded)[: len(batch)]
        array.flush()
        del array  # Windows does not rename a mapped file
        os.replace(unfinished, file)
    return np.load(file, mmap_mode="r")


def draw_images(settings: Pretrain, first: int) -> Iterator[np.ndarray]:
    """The images from number `first` on: uint8 (S, S, 3) each."""
    draw = partial(draw_image, seed=settings.seed, mix=settings.mix)
    # Ctrl-C is for this process alone: workers ignore it from their start, and are ended by leaving the pool
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    # spawn: a forked process must not inherit JAX's threads
    with multiprocessing.get_context("spawn").Pool() as pool:
        signal.signal(signal.SIGINT, handler)
        yield from pool.imap(draw, range(first, settings.images), chunksize=8)


# ---- the loop ----


def make_optimizer(settings: Pretrain) -> optax.GradientTransformation:
    """AdamW with a cosine schedule; biases and norms do not decay, and the stem's statistics never move."""
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, settings.steps // 20, max(1, settings.steps))
    decays = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.03, mask=decays))

    def kind(path, _leaf) -> str:
        return "fixed" if path[-1].key in ("mean", "std") else "learned"

    return optax.multi_transform(
        {"learned": adamw, "fixed": optax.set_to_zero()}, lambda params: jax.tree_util.tree_map_with_path(kind, params)
    )


def batch(settings: Pretrain, step: int) -> np.ndarray:
    """int (B,), the images of a step: one shuffled pass over all images after another."""
    positions = np.arange(step * settings.batch_size, (step + 1) * settings.batch_size)
    number = positions // settings.images
    orders = {p: np.random.default_rng([settings.seed, p]).permutation(settings.images) for p in set(number.tolist())}
    return np.array([orders[p][i] for p, i in zip(number.tolist(), positions % settings.images)])


def pretrain(settings: Pretrain, known: np.ndarray, folder: Path) -> dict:
    """The trained encoder's parameters. known: float16 (N, P, E), energies of the drawn images."""
    init_key, step_key = jax.random.split(jax.random.key(settings.seed))
    optimizer = make_optimizer(settings)
    sample = known[:SAMPLE].astype(np.float32).reshape(-1, ENERGIES)
    statistics = {"mean": sample.mean(axis=0), "std": sample.std(axis=0) + 1e-3}

    part = math.gcd(settings.batch_size, PART) if jax.default_backend() == "cpu" else settings.batch_size
    loss_of, with_teacher = OBJECTIVES[settings.objective], settings.objective == "teacher"

    @jax.jit
    def start_state() -> dict:
        params = init(settings.objective, init_key)
        params["vit"]["stem"] |= statistics
        # a copy, for both are donated to the first step
        teacher = jax.tree.map(jnp.copy, params) if with_teacher else {}
        return {"params": params, "teacher": teacher, "opt": optimizer.init(params)}

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: dict, known: jax.Array, step: jax.Array) -> tuple[dict, jax.Array]:
        keys = jax.random.split(jax.random.fold_in(step_key, step), len(known) // part)
        known = known.reshape(-1, part, *known.shape[1:])
        grad = partial(jax.value_and_grad(loss_of), state["params"], state["teacher"])
        losses, gradients = jax.lax.map(lambda inputs: grad(*inputs), (known, keys))
        loss, gradients = jax.tree.map(lambda leaf: leaf.mean(axis=0), (losses, gradients))
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        params, teacher = optax.apply_updates(state["params"], updates), state["teacher"]
        if with_teacher:
            teacher = optax.incremental_update(params, teacher, 1 - TEACHER_MOMENTUM)
        return {"params": params, "teacher": teacher, "opt": opt}, loss

    with open_checkpoints(folder, tidy=True) as checkpoints:
        start = checkpoints.latest_step()
        if start == settings.steps:
            return restore_params(checkpoints)
        start = start or 0  # None: nothing was saved yet
        state = restore_state(checkpoints, jax.eval_shape(start_state)) if start else start_state()
        last_save = time.monotonic()
        with progress(total=settings.steps, initial=start, desc="pre-training", unit="step") as bar:
            for step in range(start, settings.steps):
                state, loss = train_step(state, known[batch(settings, step)], np.int32(step))
                bar.update()
                if step % 20 == 0:  # reading a loss waits for the device
                    bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                if time.monotonic() - last_save > SAVE_SECONDS and step + 1 < settings.steps:
                    host_state = jax.device_get(state)
                    check_params(host_state["params"], step + 1)
                    save(checkpoints, step + 1, host_state, "")
                    last_save = time.monotonic()
        params = jax.device_get(state["params"])["vit"]
        check_params(params, settings.steps)
        save(checkpoints, settings.steps, {"params": params}, "")
    return params


def feature_whitening(params: dict, known: np.ndarray) -> dict[str, np.ndarray]:
    """Mean (2, D) and matrix (2, D, D) of each group's patch tokens: (x − mean) @ matrix has about unit covariance.

    The matrix is the symmetric one (`zca`), so that the two groups keep their common axes: their mean is what enters
    Dinomaly's bottleneck. known: float16 (n, P, E).
    """

    @jax.jit
    def groups(known: jax.Array) -> jax.Array:
        tokens = ViT(SPEC).apply({"params": params}, known.astype(jnp.float32))
        return jnp.stack([sum(tokens[block] for block in group) / len(group) for group in SPEC.groups])

    parts = [np.asarray(groups(known[i : i + 32]))[:, :, -PATCHES:] for i in range(0, len(known), 32)]
    means, matrices = [], []
    for rows in np.concatenate(parts, axis=1).reshape(len(SPEC.groups), -1, SPEC.width):
        mean, matrix = zca(rows, SHRINK)
        means.append(mean)
        matrices.append(matrix)
    return {"mean": np.stack(means), "matrix": np.stack(matrices)}


def zca(rows: np.ndarray, shrink: float) -> tuple[np.ndarray, np.ndarray]:
    """float (n, D) → float32 mean (D,) and symmetric matrix (D, D): (x − mean) @ matrix has unit covariance.

    shrink: times the largest variance, added to all; directions of much less variance than that stay small.
    """
    rows = rows.astype(np.float64)
    variance, axes = np.linalg.eigh(np.cov(rows.T))
    matrix = axes / np.sqrt(variance + shrink * variance[-1]) @ axes.T
    return rows.mean(axis=0).astype(np.float32), matrix.astype(np.float32)


if __name__ == "__main__":
    run(main)
