"""The published evaluations: their maps equal PyTorch's, and their settings fit llb's own flags."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from llb.detectors.common import SCORES, MapRule, map_matrix
from llb.encoders.specs import SPECS
from llb.encoders.vit import interpolate_positions
from llb.masks import MaskRule
from llb.protocols import PROTOCOLS, mask_rule, resized, steps_of

STORED = dict(np.load(Path(__file__).parent / "reference" / "protocol.npz"))


@pytest.mark.parametrize("case", sorted({name.split("/")[0] for name in STORED if "/" in name}))
def test_maps_and_scores_of_dinomalys_evaluation_equal_pytorchs(case):
    size, grid, side = map(int, case.split())
    matrix = map_matrix(size, grid, MapRule(True, 4.0, side))
    maps = matrix @ STORED[f"{case}/distance"] @ matrix.T
    assert maps.shape == (2, side, side)
    every = side // 32
    np.testing.assert_allclose(maps[:, ::every, ::every], STORED[f"{case}/map"], rtol=1e-5, atol=1e-6)
    score = SCORES["top-1%"](STORED[f"{case}/distance"], maps)
    np.testing.assert_allclose(score, STORED[f"{case}/score"], rtol=1e-5)


def test_maps_of_a_detector_without_smoothing_are_resized_alone():
    matrix = map_matrix(56, 8, MapRule(True, 0.0, 32))
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)  # smoothed, the border would lose some
    assert map_matrix(56, 8, MapRule(True, 4.0, 32))[0].sum() < 0.9


@pytest.mark.parametrize("side", (5, 9))
def test_position_embeddings_of_released_checkpoints_equal_pytorchs(side):
    positions = np.concatenate([np.ones((1, 3), np.float32), STORED[f"positions {side}"]])
    spec = dataclasses.replace(SPECS["dinov2_vits14_reg"], native_grid=7)
    resized = np.asarray(interpolate_positions(positions, side, side, dataclasses.replace(spec, release=True)))
    assert (resized[0] == 1).all()
    np.testing.assert_allclose(resized[1:], STORED[f"resized {side}"], rtol=1e-4, atol=1e-5)
    assert abs(resized - interpolate_positions(positions, side, side, spec)).max() > 0.01


def test_dinomaly_shows_the_centre_and_judges_its_pixels_at_256():
    dinomaly, llbnad = PROTOCOLS["dinomaly"], PROTOCOLS["llbnad"]
    assert resized(dinomaly, 392) == 448 and resized(dinomaly, 112) == 128 and resized(llbnad, 392) is None
    assert mask_rule(dinomaly, 448) == MaskRule(448, any_share=True, side=256)
    assert mask_rule(llbnad, None) == mask_rule(None, None) == MaskRule()
    assert mask_rule(None, 256) == MaskRule(256)


def test_a_pass_ends_with_what_is_left_of_the_images():
    assert steps_of(2, 771, 16) == 98 and steps_of(2, 16, 16) == 2 and steps_of(1, 1, 16) == 1


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_every_score_is_one_that_there_is(protocol):
    assert {protocol.stage1_score, protocol.test_score} <= SCORES.keys()
