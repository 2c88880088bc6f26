"""The demo as a newcomer runs it: train without a network, sample, and look with exact eyes."""
import csv
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import sample_diffusion
from conftest import ROOT, run
from eyes import COLOURS, LEFT_OUT, body_colour, look
from model import NoiseScheduler, TextEncoder, UNet, autocast, place

CPU = torch.device("cpu")
# Of what the same eyes see in the drawings; see diffusion_results/README.md for what was measured
AT_LEAST = dict(paper=0.97, flat=0.95, eyes=0.85, body=0.95, tail=0.90, ears=0.75, wings=0.90)


@pytest.fixture(scope="session")
def trained(demo):
    """(unet, scheduler, encoder) as sample_diffusion.py loads them."""
    checkpoint = sample_diffusion.load_checkpoint(demo / "output" / "demo" / "checkpoint.pt")
    unet = place(UNet(**checkpoint["config"]).eval(), CPU)
    unet.load_state_dict(checkpoint["ema"])
    return unet, NoiseScheduler(), TextEncoder(checkpoint["text_encoder"])


def draw(trained, prompts, guidance_scale=sample_diffusion.GUIDANCE_SCALE, precision="auto", seed=0):
    """One picture a prompt at the default steps -> uint8 (B, H, W, 3)."""
    unet, scheduler, encoder = trained
    rows = list(range(len(prompts)))
    pictures = sample_diffusion.draw(unet, scheduler, encoder([*prompts, ""]), rows, [(seed, i) for i in rows],
                                     autocast(CPU, precision), guidance_scale=guidance_scale)
    return pictures.permute(0, 2, 3, 1).numpy()


def pairs(left_out):
    """64 (body, tail) pairs, of those that were drawn or of those that never were."""
    every = [(body, tail) for body in COLOURS for tail in COLOURS if ((body, tail) in LEFT_OUT) == left_out]
    return random.Random(0).choices(sorted(every), k=64)


def prompt(body, tail):
    """Two colours -> a sentence."""
    return f"a {body} creature with a {tail} tail".replace("a orange", "an orange")


def share_right(pictures, wanted):
    """Of pictures (B, H, W, 3) for B (body, tail) pairs, the share whose body has its colour."""
    return np.mean([body_colour(picture) == body for picture, (body, _) in zip(pictures, wanted)])


@pytest.fixture(scope="session")
def guided(trained):
    """Guided samples for 64 pairs, uint8 (64, H, W, 3), and the pairs."""
    wanted = pairs(left_out=False)
    return draw(trained, [prompt(*pair) for pair in wanted]), wanted


def test_the_body_has_the_colour_asked_for(guided):
    assert share_right(*guided) >= 0.95


def test_and_so_it_has_where_the_combination_was_never_drawn(trained):
    wanted = pairs(left_out=True)
    pictures = draw(trained, [prompt(*pair) for pair in wanted])
    assert share_right(pictures, wanted) >= 0.90


@pytest.fixture(scope="session")
def by_caption(trained):
    """Guided samples for the captions of 128 drawings, and these drawings at their size, both uint8 (128, H, W, 3)."""
    rows = [json.loads(line) for line in open(ROOT / "examples" / "creatures" / "metadata.jsonl")][:128]
    size, captions = trained[0].config["image_size"], [row["text"] for row in rows]
    drawings = np.stack([np.asarray(Image.open(ROOT / "examples" / "creatures" / row["file_name"])
                                    .resize((size, size), Image.Resampling.BILINEAR)) for row in rows])
    return draw(trained, captions), drawings, captions


def test_the_pictures_look_like_the_drawings(by_caption):
    """White background, flat colours, two eyes, parts in the colours asked for: red if the network predicts v again."""
    pictures, drawings, captions = by_caption
    seen, expected = look(pictures, captions), look(drawings, captions)
    short = {name: (seen[name], expected[name]) for name in AT_LEAST if seen[name] < AT_LEAST[name] * expected[name]}
    assert not short


def test_guided_pictures_are_as_bright_as_the_drawings(by_caption, guided, trained):
    """No dark, no tinted pictures: neither caption dropout nor the clipping of x_0 is missing."""
    pictures, drawings, _ = by_caption
    assert pictures.mean() == pytest.approx(drawings.mean(), rel=0.05)
    assert np.abs(pictures.mean(axis=(0, 1, 2)) - drawings.mean(axis=(0, 1, 2))).max() < 0.1 * 255
    plain = draw(trained, [prompt(*pair) for pair in guided[1]], guidance_scale=1)
    assert guided[0].mean() == pytest.approx(plain.mean(), rel=0.05)


def test_no_speckles(guided):
    """Bytes that were not clamped would turn white into black and back, pixel by pixel."""
    pictures, _ = guided
    corners = np.concatenate([pictures[:, :2, :2].reshape(-1, 3), pictures[:, :2, -2:].reshape(-1, 3)])
    assert np.mean(corners.min(axis=1) > 128) > 0.99


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
    picture, sheet = (Image.open(demo / "output" / name) for name in ("sample_00.png", "sample.png"))
    assert picture.size == (32, 32) and body_colour(np.asarray(picture)) == "red"
    assert sheet.width >= 128 and "a red creature with a blue tail" in sheet.text["prompt"]


def test_the_same_seed_gives_the_same_picture_in_any_batch(trained):
    """The other pictures of a batch change nothing but its rounding, which bf16 makes visible here and there."""
    def difference(precision):
        alone = draw(trained, ["a red creature with a pink tail"], 3.0, precision)
        together = draw(trained, ["a red creature with a pink tail"] + ["a blue creature with a red tail"] * 2, 3.0,
                        precision)
        return np.abs(alone[0].astype(int) - together[0].astype(int))
    assert difference("auto").mean() < 1                                     # other noise: 4 to 22
    assert difference("fp32").max() <= 1


def test_checkpoints_hold_tensors_and_plain_values_only(demo):
    checkpoint = torch.load(demo / "output" / "demo" / "checkpoint.pt", weights_only=True)
    assert {"format", "config", "settings", "dataset", "text_encoder", "fingerprint", "epoch", "batch", "loss_sum",
            "seconds", "log", "early", "model", "ema", "optimizers"} == set(checkpoint)
