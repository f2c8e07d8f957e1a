"""Time the parts of llb, and beside each the reference's way, in one run and on the same inputs.

    python -m llb.bench                                     two CPU cores, below 10 minutes
    python -m llb.bench --against torch --json bench.json   the same work in PyTorch too, where it is installed
    python -m llb.bench --detectors                         fitted detectors beside the way people write them
    python -m llb.bench --gpu                               an accelerator's figures, about 4 minutes

llb/bench/README.md has the tables of the last runs.
"""

from dataclasses import dataclass
from functools import partial

from llb.bench import cpu, gpu
from llb.bench.common import Sizes
from llb.bench.process import import_torch
from llb.console import run_script, say
from llb.device import start_jax
from llb.encoders.specs import SPECS, Spec
from llb.files import UserError, check_writable_file, write_json
from llb.flags import flag, parse_flags, whole

# the reference's way has no CNN and no filter bank
ENCODERS = tuple(name for name, spec in SPECS.items() if isinstance(spec, Spec) and not spec.filter_bank)


@dataclass
class Bench:
    """Time the parts of llb beside the reference's way of doing them."""

    json: str | None = flag(None, "write all measurements to this file", shown="not written")
    against: str | None = flag(None, "do the same work in PyTorch too", choices=("torch",), shown="only JAX")
    detectors: bool = flag(False, "fitted detectors; of the flags below only --rounds is used")
    gpu: bool = flag(False, "an accelerator's figures: ViT-B/14, batch 16, K = 3 and 8; the flags below are not used")
    rounds: int = flag(2, "how often the ways take turns; the rounds divide the reference's stage 1", whole(1))
    encoder: str = flag("dinov2_vits14_reg", "whose sizes; weights are random", choices=ENCODERS)
    image_size: int = flag(392, "side in pixels, a multiple of the patch size", whole(1))
    images: int = flag(32, "training images", whole(2))
    submodels: int = flag(3, "K", whole(1))
    batch_size: int = flag(4, "images per step, sub-model, and per call of the reference", whole(1))
    steps: int = flag(6, "steps of each sub-model", whole(1))
    maps: int = flag(504, "maps for the pixel metrics", whole(2))
    reference_maps: int = flag(16, "of these for the reference's way, whose time grows with their number", whole(2))


def main() -> None:
    settings = parse_flags(Bench)
    sizes = gpu.SIZES if settings.gpu else sizes_of(settings)
    device = start_jax()
    say(device)
    if settings.json:
        check_writable_file(settings.json, "--json")
    torch = import_torch() if settings.against else None
    if settings.gpu:
        gpu.check(torch)
        keep = partial(write_json, settings.json) if settings.json else None
        gpu.measure(sizes, device, torch, keep)
    else:
        if settings.detectors:
            results = cpu.measure_detectors(device, settings.rounds)
        else:
            results = cpu.measure(sizes, device, settings.rounds, torch is not None)
        if settings.json:
            write_json(settings.json, results)
    if settings.json:
        say(f"written: {settings.json}")


def sizes_of(settings: Bench) -> Sizes:
    """The sizes that the flags ask for.

    Raises:
        UserError: they do not fit together.
    """
    spec = SPECS[settings.encoder]
    if settings.image_size % spec.patch:
        raise UserError(
            f"--image-size {settings.image_size}: {spec.name} needs a multiple of its patch size, {spec.patch}"
        )
    if settings.images < settings.submodels:
        raise UserError(f"--images {settings.images}: give at least --submodels, {settings.submodels}")
    if settings.reference_maps > settings.maps:
        raise UserError(f"--reference-maps {settings.reference_maps}: give at most --maps, {settings.maps}")
    return Sizes(
        spec=spec,
        image_size=settings.image_size,
        images=settings.images,
        submodels=settings.submodels,
        batch_size=settings.batch_size,
        steps=settings.steps,
        maps=settings.maps,
        reference_maps=settings.reference_maps,
    )


if __name__ == "__main__":
    run_script(main, resumable=False)
