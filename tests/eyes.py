"""
Exact eyes for the demo's creatures: is the paper clean, is the paint flat, which colours have the parts, are there
two eyes?

A picture is a uint8 array (H, W, 3), square, of any size: a drawing or a sample. The drawings keep one square
free for the body and areas for the other parts (examples/make_examples.py), so no model is needed to see. The areas
are chosen so that the drawings themselves pass: see OWN.
"""
import re
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from make_examples import BODY_BLOCK, COLOURS, INK, LEFT_OUT, SIZE, TAIL_AREA  # noqa: E402, F401

WHITE = (255, 255, 255)
NAMES = list(COLOURS)
KNOWN = np.array([*COLOURS.values(), INK, WHITE], float)  # (10, 3), all that the drawings are made of

# In pixels of a picture that is SIZE a side
EAR_AREA = (12, 48, 2, 10)   # left, right, top, bottom: above every head there is nothing but ears here
WING_AREA = (12, 30)         # only a wing is this near (x) to the left or right edge and this far up (y)
HEAD_AREA = (13, 51, 13, 28)  # left, right, top, bottom: both eyes are in here
EYE_SIZE = (2, 30)           # square pixels of an eye's white ...
EYES_APART = (7, 13)         # ... and pixels from it to the other eye's ...
EYES_LEVEL = 4               # ... and up or down, at most
EYE_WHITE, EYE_INK = 0.5, 0.3  # least share of white in the pixels of an eye's white, of ink in some pixel beside it

# What `look` says of the 400 drawings themselves, resized as train_diffusion.py does it. (Wings that reach the edge are
# not paper, and outlines are a mixture of colours: the smaller the picture, the more of it.)
OWN = {
    32: dict(paper=0.929, flat=0.754, eyes=0.995, body=1.0, tail=1.0, ears=0.990, wings=1.0),
    64: dict(paper=0.994, flat=0.898, eyes=0.982, body=1.0, tail=1.0, ears=1.0, wings=1.0),
}


FIGURES = ("paper", "flat", "eyes", "body", "tail", "ears", "wings")  # in the order in which they are reported


def box(picture, left, right, top, bottom):
    """The part of a picture that lies between these borders, given in pixels of a drawing."""
    scale = len(picture) / SIZE
    left, right, top, bottom = (round(scale * v) for v in (left, right, top, bottom))
    return np.asarray(picture)[top:bottom, left:right]


def paper(picture):
    """Share of the outermost two pixels that is white within 8 of 255."""
    white = (np.asarray(picture) >= 255 - 8).all(axis=-1)
    white_inside, size = white[2:-2, 2:-2], len(white)
    return (white.sum() - white_inside.sum()) / (size ** 2 - (size - 4) ** 2)


def flat(picture):
    """Share of the pixels within 24 of 255 (largest channel difference) of one of the ten drawn colours."""
    return np.mean(np.abs(np.asarray(picture, float)[..., None, :] - KNOWN).max(-1).min(-1) <= 24)


def body(picture):
    """The median of the body's square: (3,)."""
    x, y, half = BODY_BLOCK
    return np.median(box(picture, x - half, x + half, y - half, y + half).reshape(-1, 3), axis=0)


def body_colour(picture):
    """Name of the palette colour nearest to the body's."""
    return NAMES[((KNOWN[:len(NAMES)] - body(picture)) ** 2).sum(1).argmin()]


def tail_colour(picture):
    """Name of the colour most frequent where only a tail can be, or None where hardly anything is drawn."""
    width, top = TAIL_AREA
    pixels = np.concatenate([box(picture, 0, width, top, SIZE), box(picture, SIZE - width, SIZE, top, SIZE)], axis=1)
    nearest = ((pixels[..., None, :].astype(float) - KNOWN) ** 2).sum(-1).argmin(-1)
    counts = np.bincount(nearest.ravel(), minlength=len(KNOWN))[:len(NAMES)]
    return NAMES[counts.argmax()] if counts.max() >= 12 * (len(picture) / SIZE) ** 2 else None


def colour_of(pixels, least):
    """Name of the palette colour that most pixels (..., 3) have, or None if fewer than `least` have any.

    A pixel counts for a colour by its nearness, exp(-(d / 40)^2) of their largest channel difference d: the many
    pixels of thin parts that mix a colour with the outline or the paper would be nearest to quite another one.
    """
    apart = np.abs(pixels.reshape(-1, 1, 3).astype(float) - KNOWN[:len(NAMES)]).max(-1)   # (pixels, 8)
    counts = np.exp(-(apart / 40) ** 2).sum(axis=0)
    return NAMES[counts.argmax()] if counts.max() >= least else None


def ears_colour(picture):
    """Name of the ears' colour, or None where hardly anything is drawn."""
    return colour_of(box(picture, *EAR_AREA), 2 * (len(picture) / SIZE) ** 2)


def wings_colour(picture):
    """Name of the wings' colour, or None where hardly anything is drawn."""
    width, bottom = WING_AREA
    sides = [box(picture, left, left + width, 0, bottom) for left in (0, SIZE - width)]
    return colour_of(np.concatenate(sides, axis=1), 12 * (len(picture) / SIZE) ** 2)


def blobs(mask):
    """Connected groups of True, corners included: a list of arrays (n, 2) of their rows and columns."""
    left, found = {tuple(place) for place in np.argwhere(mask).tolist()}, []
    while left:
        group = [left.pop()]
        for y, x in group:                                   # grows while it is walked through
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            group += near
        found.append(np.array(group))
    return found


def two_eyes(picture):
    """Are there two small separate blobs of white with ink beside them, on a level, in the head's area?

    Every pixel is taken apart into shares of the body's own colour, ink and white, whatever that colour is. A blob
    that reaches the area's left or right edge is paper.
    """
    scale, own = len(picture) / SIZE, body(picture)
    mix = np.linalg.pinv(np.stack([np.array(INK) - own, np.array(WHITE) - own]))          # (3, 2)
    ink, white = np.moveaxis((box(picture, *HEAD_AREA) - own) @ mix, -1, 0)               # (h, w) each
    reach, spots = max(1, round(2 * scale)), []
    for blob in blobs(white > EYE_WHITE):
        (top, left), (bottom, right) = blob.min(axis=0), blob.max(axis=0)
        beside = ink[top:bottom + 1, max(0, left - reach):right + reach + 1]
        if (EYE_SIZE[0] <= len(blob) / scale ** 2 <= EYE_SIZE[1] and 0 < left and right < white.shape[1] - 1
                and (beside > EYE_INK).any()):
            spots.append(blob.mean(axis=0) / scale)
    return any(EYES_APART[0] <= abs(a[1] - b[1]) <= EYES_APART[1] and abs(a[0] - b[0]) <= EYES_LEVEL
               for a, b in combinations(spots, 2))


def asked_for(caption):
    """The parts whose colour a caption names -> their colours, as in dict(body="red", tail="blue")."""
    found = {part: re.search(rf"(\w+) {word}\b", caption)
             for part, word in dict(body="creature", tail="tail", ears="ears", wings="wings").items()}
    return {part: match[1] for part, match in found.items() if match and match[1] in COLOURS}


def look(pictures, captions):
    """Pictures (B, H, W, 3) and their captions -> the mean of each of FIGURES, nan where no caption names the part."""
    seen = dict(paper=[paper(picture) for picture in pictures], flat=[flat(picture) for picture in pictures],
                eyes=[two_eyes(picture) for picture in pictures])
    colours = dict(body=body_colour, tail=tail_colour, ears=ears_colour, wings=wings_colour)
    for part, colour in colours.items():
        wanted = [(picture, asked_for(caption).get(part)) for picture, caption in zip(pictures, captions)]
        seen[part] = [colour(picture) == name for picture, name in wanted if name]
    return {name: float(np.mean(values)) if values else float("nan") for name, values in seen.items()}
