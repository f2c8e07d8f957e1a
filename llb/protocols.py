"""The published evaluations, in one switch: the defaults that `--protocol` fills in where a flag is not given.

"llbnad"    LLBNAD (arXiv 2508.07441). The committed defaults of its release (K = 3, keep 20 %, 10 steps) are not those
            of its analysis scripts, which name runs f{0,10,20,40}_t40_num{1,3,5,7}_iter1000_meanscores: keep 40 %,
            K = 5, 1,000 steps, mean. Most likely these are the paper's. Images go straight to 392 × 392. The score of
            an image is the mean of its map's highest 1 % in stage 1, the map's maximum in the test. Stage 2 takes two
            passes over what was kept. The mean holds for every detector, so a memory bank's score of an image that it
            has learned from, too low, counts, too: `--aggregate out-of-fold` leaves it out.
"dinomaly"  Dinomaly (CVPR 2025, arXiv 2405.14325), one model for a category. The image is resized to 448 × 448 and its
            centre of 392 × 392 is shown: 23 % of the area is never seen, and defects there count only for the image.
            Maps are resized to 256 × 256, then smoothed by a kernel of 5 × 5 (σ = 4, zeros around the border); masks
            are `> 0` after bilinear resizing, then picked at 256. Score: the mean of the map's highest 1 %.

K, aggregate, keep, image sizes, maps and masks hold for every detector. How Dinomaly learns (recipe, steps, passes,
batch size) and takes the score of an image holds for it alone: other detectors have published values of their own.

What cannot be reproduced, or is not followed on purpose:

- LLBNAD reports the best of its test evaluations. Here the last step counts: nothing is chosen on the test set.
- LLBNAD's release selects by position in a set that it has permuted twice. Here a score belongs to its image.
- LLBNAD's masks are `> 0.5` after resizing; here they are `≥ 0.5`, and a defect too small to reach that stays.
- LLBNAD's map is half the mean of the groups. Only the scale differs, so no metric does.
- The released AUPRO is an approximation: adeval with 50 strips (within .006), or 100 thresholds whose false-positive
  rates are rescaled by their extremes (off by up to .03). Here the definition is followed (llb.metrics).
- Both interpolate the encoder's position embeddings without antialiasing and with an offset of 0.1: features differ by
  0.8 % (cosine 4e-5). So do both protocols here (`Spec.release`); without a protocol positions are transformers'.
- Dinomaly's main table is of one model for all categories.
- Random numbers: the subsets, the batches, the initialisation and the dropout are drawn otherwise.
"""

from dataclasses import dataclass, field
from typing import Any

from llb.masks import MaskRule


@dataclass(frozen=True)
class Protocol:
    """What one published evaluation has; what is not named here is llb's own."""

    stage1: dict[str, Any]  # flag → default, of Dinomaly alone
    stage2: dict[str, Any]  # likewise; passes: over what was kept, in place of steps
    stage1_score: str  # of an image, from its map (llb.detectors.common.SCORES), of Dinomaly alone
    test_score: str
    every: dict[str, Any] = field(default_factory=dict)  # flag of stage 1 → default, of every detector
    shown: float = 1.0  # side of the centre that is shown, of the resized image's side
    any_share: bool = False  # of masks, see MaskRule
    map_side: int | None = None  # of maps, see llb.detectors.common.MapRule


PROTOCOLS = {
    "llbnad": Protocol(
        every={"submodels": 5, "aggregate": "mean", "keep": 0.4},
        stage1={"recipe": "llbnad", "steps": 1000, "batch_size": 16},
        stage2={"passes": 2},
        stage1_score="top-1%",
        test_score="max",
    ),
    "dinomaly": Protocol(
        stage1={"recipe": "dinomaly", "batch_size": 16},
        stage2={"steps": 5000},
        stage1_score="top-1%",
        test_score="top-1%",
        shown=392 / 448,
        any_share=True,
        map_side=256,
    ),
}


def resized(protocol: Protocol, image_size: int) -> int | None:
    """The side to which images are resized before the centre of `image_size` is taken; None: no more is resized."""
    return None if protocol.shown == 1 else round(image_size / protocol.shown)


def mask_rule(protocol: Protocol | None, resize: int | None) -> MaskRule:
    """How masks follow the images. resize: as the run has it, whether a flag or the protocol says so."""
    return MaskRule(resize, protocol.any_share, protocol.map_side) if protocol else MaskRule(resize)


def steps_of(passes: int, images: int, batch_size: int) -> int:
    """Optimiser steps of so many passes over the images, the last batch of a pass being smaller or filled up."""
    return passes * -(-images // batch_size)
