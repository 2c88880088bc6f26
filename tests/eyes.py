"""
Exact eyes for the demo's creatures: which colour is the body, which the tail?

A picture is a uint8 array (H, W, 3), square, of any size: a drawing or a sample. The drawings keep one square
free for the body and one area at each side for the tail (BODY_BLOCK, TAIL_AREA of examples/make_examples.py),
so no model is needed to see.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'examples'))
from make_examples import BODY_BLOCK, COLOURS, INK, LEFT_OUT, SIZE, TAIL_AREA  # noqa: E402, F401

WHITE = (255, 255, 255)
NAMES = list(COLOURS)


def nearest(pixels):
    """Index of the nearest of the colours, then ink, then white for pixels (..., 3)."""
    known = np.array([*COLOURS.values(), INK, WHITE], float)               # (10, 3)
    return ((np.asarray(pixels, float)[..., None, :] - known) ** 2).sum(-1).argmin(-1)


def body_colour(picture):
    """Name of the palette colour nearest to the median of the body's square."""
    scale = len(picture) / SIZE
    x, y, half = BODY_BLOCK
    x0, x1, y0, y1 = (round(scale * v) for v in (x - half, x + half, y - half, y + half))
    median = np.median(np.asarray(picture)[y0:y1, x0:x1].reshape(-1, 3), axis=0)
    palette = np.array(list(COLOURS.values()), float)
    return NAMES[((palette - median) ** 2).sum(1).argmin()]


def tail_colour(picture):
    """Name of the colour most frequent where only a tail can be, or None where hardly anything is drawn."""
    scale = len(picture) / SIZE
    width, top = (round(scale * v) for v in TAIL_AREA)
    low = np.asarray(picture)[top:]
    found = nearest(np.concatenate([low[:, :width], low[:, -width:]], axis=1))
    counts = np.bincount(found.ravel(), minlength=len(NAMES) + 2)[:len(NAMES)]
    return NAMES[counts.argmax()] if counts.max() >= 12 * scale ** 2 else None
