"""The demo as a newcomer runs it: train without a network, sample, and look with exact eyes."""
import csv
import random

import numpy as np
import pytest
import torch
from PIL import Image

import eyes
import quality
from conftest import run

# Measured ... on 128 guided samples of the demo at default settings; asserted with room for noise
PAPER = 0.95            # of the drawings' own figure, measured ...
FLAT = 0.88             # of the drawings' own figure, measured ...
TWO_EYES = 0.70         # share of the samples, measured ...
BODY = 0.95             # share with the colour that the caption names, measured ...
BODY_LEFT_OUT = 0.90    # the same of (body, tail) colours that were never drawn, measured ...
TAIL = 0.85             # measured ...
EARS = 0.75             # measured ...
WINGS = 0.75            # measured ...
COLOUR_WORDS = 0.95     # measured ...
BRIGHTNESS = 0.05       # relative difference from the drawings and from plain samples, measured ...
DISTANCE = 150          # kernel distance to the drawings, times 1,000, measured ...
SAMPLES, LEFT_OUT = 128, 64


@pytest.fixture(scope="session")
def trained(demo):
    return quality.load(demo / "output" / "demo" / "checkpoint.pt", torch.device("cpu"))


@pytest.fixture(scope="session")
def guided(trained):
    """Samples of the held-out captions, then of others, at default settings: uint8 (B, 3, H, W)."""
    return trained.draw(trained.first(SAMPLES))


@pytest.fixture(scope="session")
def seen(trained, guided):
    return eyes.look(guided.permute(0, 2, 3, 1).numpy(), trained.first(SAMPLES))


@pytest.fixture(scope="session")
def own():
    """What the same eyes see in the drawings."""
    return eyes.OWN[32]


def test_the_paper_is_white(seen, own):
    assert seen["paper"] >= PAPER * own["paper"]


def test_the_paint_is_flat(seen, own):
    assert seen["flat"] >= FLAT * own["flat"]


def test_there_are_two_eyes(seen):
    assert seen["eyes"] >= TWO_EYES


@pytest.mark.parametrize("part, share", [("body", BODY), ("tail", TAIL), ("ears", EARS), ("wings", WINGS)])
def test_each_part_has_the_colour_asked_for(seen, part, share):
    assert seen[part] >= share


def test_so_has_the_body_where_the_combination_was_never_drawn(trained):
    wanted = random.Random(0).choices(sorted(eyes.LEFT_OUT), k=LEFT_OUT)
    captions = [f"a {body} creature with a {tail} tail".replace("a orange", "an orange") for body, tail in wanted]
    pictures = trained.draw(captions).permute(0, 2, 3, 1).numpy()
    assert eyes.look(pictures, captions)["body"] >= BODY_LEFT_OUT


def test_colour_words_decide_the_hue(trained):
    right, own = quality.colour_words(trained, ["red", "blue", "green", "yellow"], "a {} creature", 8)
    assert sum(right.values()) >= COLOUR_WORDS * 4 * 8
    assert all(found == count > 0 for found, count in own.values())


def test_guided_pictures_are_as_bright_as_the_drawings(guided, trained):
    """No dark, no tinted pictures: neither caption dropout nor the clipping of x_0 is missing."""
    drawings, plain = trained.pictures.pixels.float(), trained.draw(trained.first(SAMPLES // 2), scale=1.0).float()
    assert guided.float().mean() == pytest.approx(drawings.mean(), rel=BRIGHTNESS)
    assert guided[:len(plain)].float().mean() == pytest.approx(plain.mean(), rel=BRIGHTNESS)
    assert (guided.float().mean(dim=(0, 2, 3)) - drawings.mean(dim=(0, 2, 3))).abs().max() < 0.1 * 255


def test_no_sample_is_a_copy(guided, trained):
    assert quality.copies(trained, trained.pictures.pixels[trained.training[:4]]) == 4    # it would be seen
    assert quality.copies(trained, guided) <= SAMPLES // 50


@pytest.mark.skipif(bool(quality.missing_packages()), reason=f"needs pip install {quality.missing_packages()}")
def test_the_kernel_distance_to_the_drawings_is_small(guided, trained):
    distance, error = quality.kernel_distance(quality.features(guided), quality.features(trained.pictures.pixels))
    assert distance <= DISTANCE and error < DISTANCE / 3


def test_the_kernel_distance_and_its_error_are_right():
    """Samples of one distribution are at distance 0, and the error is that of many repetitions."""
    generator = torch.Generator().manual_seed(0)
    apart = [quality.kernel_distance(torch.randn(64, 16, generator=generator) + shift,
                                     torch.randn(128, 16, generator=generator), times=50)
             for shift in (0, 0.5) for _ in range(100)]
    distances, errors = np.array(apart).reshape(2, 100, 2).transpose(2, 0, 1)
    spread = distances.std(axis=1)
    assert abs(distances[0].mean()) < 3 * spread[0] / 10
    assert errors[1].mean() == pytest.approx(spread[1], rel=0.25)


def test_the_text_is_used(demo):
    with open(demo / "output" / "demo" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    last = {name: float(value) for name, value in rows[-1].items()}
    assert last["val_loss"] < 0.97 * last["val_loss_shuffled"] and last["val_loss"] < 0.97 * last["val_loss_empty"]
    assert last["val_loss"] < 0.5 * float(rows[0]["val_loss"])


def test_the_readmes_next_command_draws_from_the_demo(demo):
    done = run("sample_diffusion.py", "a red creature with a blue tail", cwd=demo)
    assert done.returncode == 0, done.stderr
    assert "output/demo/checkpoint.pt" in done.stdout
    assert eyes.body_colour(np.asarray(Image.open(demo / "output" / "sample.png"))) == "red"


def test_the_same_seed_gives_the_same_picture_in_any_batch(trained):
    alone = trained.draw(["a red creature with a pink tail"])
    together = trained.draw(["a red creature with a pink tail"] + ["a blue creature with a red tail"] * 2)
    assert (alone[0].int() - together[0].int()).abs().max() <= 1


def test_checkpoints_hold_tensors_and_plain_values_only(demo):
    checkpoint = torch.load(demo / "output" / "demo" / "checkpoint.pt", weights_only=True)
    assert {"config", "flags", "dataset", "fingerprint", "num_timesteps", "model", "ema", "optimizer", "step", "epoch",
            "seconds", "format"} <= set(checkpoint)
