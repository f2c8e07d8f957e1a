"""Which training images a person looks at, and in which order: pages of suspects. No JAX.

Most of a page are the highest-ranked images that were not shown yet: there the defects are. The rest are drawn at
random from all others, so that a look also tells how many defects there are where nobody looks (Li et al., "Deep batch
active anomaly detection with diverse queries", ICLR 2023, mix high scores and diversity).
"""

from typing import NamedTuple

import numpy as np

PAGE, DRAWN = 24, 3  # images on a page, and how many of them are drawn at random
MOST = 480  # images on all pages: 20 pages


class Page(NamedTuple):
    images: np.ndarray  # int (n,), n ≤ PAGE: indices of the training images, by rank
    drawn: np.ndarray  # bool (n,): which were drawn at random


def suspect_pages(rank: np.ndarray, seed: int, most: int = MOST) -> list[Page]:
    """The pages, in order, until `most` images are on them or none is left; only the last page may be smaller.

    Page after page the PAGE − DRAWN images of highest rank that are not shown yet, and DRAWN of all others, each with
    the same chance. So the first pages do not depend on `most`.

    Args:
        rank: int (N,), 1 for the first suspect.
        seed: of the run.
    """
    order, pages = np.argsort(rank), []
    generator = np.random.default_rng(seed)
    while len(order) and (room := min(PAGE, most - PAGE * len(pages))) > 0:
        highest, rest = np.split(order, [room - min(DRAWN, room)])
        drawn = generator.choice(rest, min(DRAWN, room, len(rest)), replace=False)
        images = np.concatenate([highest, drawn])
        images = images[np.argsort(rank[images])]
        pages.append(Page(images, np.isin(images, drawn)))
        order = order[~np.isin(order, images)]
    return pages
