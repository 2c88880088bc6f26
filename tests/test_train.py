"""train_diffusion.py: data, loss, and whole runs."""
import argparse
import csv
import io
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import sample_diffusion
import train_diffusion as train
from conftest import ROOT, TINY_CLIP, run, small_flags
from model import NO_CAPTION, UNet, UserError, generator_for


def args_for(path, **more):
    return argparse.Namespace(**dict(dataset=str(path), image_column="image", caption_column=None,
                                     output_dir=Path("nowhere")), **more)


def load(path, encoder, size=16):
    return train.Pictures(train.read_rows(args_for(path)), size, encoder)


@pytest.fixture(scope="module")
def pictures(folder, encoder):
    return load(folder, encoder)


def twenty(pictures):
    """All of the folder's pictures with their own captions."""
    return pictures.batch(torch.arange(20), torch.arange(20))


def made_of(captions, encoder, different=True):
    """Pictures of noise, or all the same one, with these captions."""
    noise = [encoded(Image.effect_noise((8, 8), 99).convert("RGB")) for _ in (captions if different else "1")]
    return train.Pictures([(f"{i}", noise[i % len(noise)], caption) for i, caption in enumerate(captions)], 8, encoder)


def words(pictures, *rows):
    """The states of these captions' tokens, one list of bytes per caption, so that == compares them."""
    _, states, mask = pictures.batch([0] * len(rows), list(rows))
    return [row[real].numpy().tobytes() for row, real in zip(states, mask)]


def numbers(tree):
    """A checkpoint's nested values -> the same with every tensor as bytes, so that == compares bit for bit."""
    if isinstance(tree, dict):
        return {key: numbers(value) for key, value in tree.items() if key != "seconds"}  # it is never the same
    if isinstance(tree, (list, tuple)):
        return [numbers(value) for value in tree]
    return tree.numpy().tobytes() if isinstance(tree, torch.Tensor) else tree


def saved(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def steps_done(out):
    """By its checkpoint, of a run with four steps per epoch."""
    return 4 * saved(out)["epoch"] + saved(out)["batch"]


def logged(out):
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


class Enough(Exception):
    """Ends a run in the middle of a step, when the test has seen what it wanted."""


@pytest.fixture
def main(small, monkeypatch):
    """main(*flags) -> train_diffusion.main in this process, small, watched, and with nothing drawn."""
    loss = train.diffusion_loss
    monkeypatch.setattr(train, "draw", lambda unet, scheduler, text, rows, seeds, amp:
                        torch.zeros(len(rows), 3, 16, 16, dtype=torch.uint8))
    monkeypatch.setattr(train, "plot_losses", lambda rows, path: path.write_bytes(b"a curve"))

    def main(*flags, look=lambda step, unet, batch: None, change=lambda step, loss: loss):
        """look: called before each training step of this run; change: gets its losses and gives others."""
        steps = count()

        def watched(unet, scheduler, *batch):
            if not torch.is_grad_enabled():
                return loss(unet, scheduler, *batch)  # of validation
            step = next(steps)
            look(step, unet, batch)
            return change(step, loss(unet, scheduler, *batch))
        monkeypatch.setattr(train, "diffusion_loss", watched)
        train.main([str(flag) for flag in (*small, *flags)])
    return main


def written(folder, path, *flags):
    """What a whole run wrote; its sheets are drawn in two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw", lambda *args: sample_diffusion.draw(*args, steps=2))
        train.main([str(flag) for flag in (*small_flags(folder, path), *flags)])
    return path / "run"


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """What a run of one epoch, of four steps, wrote; tests copy the folder."""
    return written(folder, tmp_path_factory.mktemp("trained"), "--epochs", 1)


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """What a run of two epochs wrote that nothing interrupted."""
    return written(folder, tmp_path_factory.mktemp("straight"), "--epochs", 2, "--sample-every", 1)


# ---------------------------------------------------------------------------------------------- data

def test_three_layouts_give_the_same_pictures(folder, encoder, tmp_path):
    rows = [json.loads(line) for line in open(folder / "metadata.jsonl")]
    texts, parquet = tmp_path / "texts", tmp_path / "parquet"
    texts.mkdir(), parquet.mkdir()
    for row in rows:
        shutil.copy(folder / row["file_name"], texts)
        (texts / row["file_name"]).with_suffix(".txt").write_text(row["text"] + "\n")
    table = {"image": [str(folder / row["file_name"]) for row in rows], "en_text": [row["text"] for row in rows],
             "zh_text": ["-"] * len(rows)}
    datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).to_parquet(parquet / "train-0.parquet")
    found = [load(path, encoder) for path in (folder, texts, parquet)]
    order = [sorted(range(20), key=lambda i: pictures.pixels[i].tolist()) for pictures in found]
    first = found[0].batch(order[0], order[0])
    assert found[0].pixels.dtype == torch.uint8
    assert first[0].shape == (20, 3, 16, 16) and first[0].min() >= -1 and first[0].max() <= 1
    for pictures, rows in zip(found[1:], order[1:]):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(pictures.batch(rows, rows), first))


def encoded(picture, **options):
    file = io.BytesIO()
    picture.save(file, **{"format": "PNG", **options})
    return file.getvalue()


def middle(image):
    return train.decode("picture", image, 16)[:, 8, 8].tolist()


def test_every_kind_of_picture_comes_out_as_rgb_on_white():
    red = Image.new("RGB", (20, 20), (200, 40, 10))
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    half = Image.new("RGBA", (20, 20), (0, 0, 0, 128))
    palette = red.quantize(4)
    see_through = palette.copy()
    see_through.info["transparency"] = see_through.getpixel((0, 0))
    assert middle(encoded(red)) == [200, 40, 10]
    assert middle(encoded(clear)) == [255, 255, 255]
    assert middle(encoded(half)) == pytest.approx([127] * 3, abs=1)
    assert middle(encoded(Image.new("LA", (20, 20), (0, 0)))) == [255, 255, 255]
    assert middle(encoded(palette)) == [200, 40, 10]
    assert middle(encoded(see_through, transparency=see_through.getpixel((0, 0)))) == [255, 255, 255]
    assert middle(encoded(Image.new("L", (20, 20), 90))) == [90, 90, 90]
    assert middle(encoded(Image.new("1", (20, 20), 1))) == [255, 255, 255]
    grey16 = Image.fromarray(np.full((20, 20), 90 * 257, dtype=np.uint16))
    assert middle(encoded(grey16)) == [90, 90, 90]
    assert middle(encoded(grey16, format="TIFF")) == [90, 90, 90]
    assert middle(encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), format="TIFF")) == [255, 0, 0]


@given(mode=st.sampled_from(["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB",
                             "HSV", "I", "F", "I;16", "I;16B"]),
       format=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]), width=st.integers(1, 70),
       height=st.integers(1, 70), size=st.sampled_from([8, 64]), orientation=st.integers(0, 9),
       seed=st.integers(0, 2 ** 32 - 1))
@settings(max_examples=300, deadline=None)
def test_any_picture_that_can_be_saved_can_be_read(mode, format, width, height, size, orientation, seed):
    """A property: whatever mode, size, format and orientation, a picture comes out as (3, size, size) bytes."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    try:
        picture = Image.fromarray(noise).convert(mode)
        exif = picture.getexif()
        exif[0x0112] = orientation
        image = encoded(picture, format=format, exif=exif)
    except (OSError, ValueError, KeyError):
        assume(False)  # this format has no such mode
    found = train.decode("picture", image, size)
    assert found.shape == (3, size, size) and found.dtype == torch.uint8
    if mode in ("RGB", "RGBX") and format == "PNG" and (width, height) == (size, size) and orientation in (0, 1, 9):
        assert np.array_equal(found.numpy(), noise.transpose(2, 0, 1))


@given(content=st.binary(max_size=200), cut=st.integers(0, 3000), where=st.integers(0, 3000),
       format=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
@settings(max_examples=300, deadline=None)
def test_a_damaged_picture_is_read_or_named(content, cut, where, format):
    """A property: with bytes overwritten and cut off, a picture is read all the same or said to be unreadable."""
    whole = bytearray(encoded(Image.effect_noise((40, 40), 90).convert("RGB"), format=format))
    whole[where:where + len(content)] = content
    try:
        assert train.decode("a.png", bytes(whole[cut:]), 16).shape == (3, 16, 16)
    except UserError as error:
        assert "picture a.png can't be read" in str(error)


def test_a_dark_16_bit_picture_stays_dark():
    dark = Image.fromarray(np.full((20, 20), 200, dtype=np.uint16))  # 200 of 65,535 is nearly black
    assert max(middle(encoded(dark))) <= 1


def test_pictures_are_turned_upright_and_cut_to_a_square():
    wide = Image.new("RGB", (40, 20), "white")
    wide.paste("red", (0, 0, 40, 10))                 # red above
    exif = Image.Exif()
    exif[0x0112] = 3                                  # stored upside down
    found = train.decode("picture", encoded(wide, format="JPEG", exif=exif), 16)
    assert found.shape == (3, 16, 16)
    assert found[1, 2, 8] > 200 > 100 > found[1, 13, 8]  # so the red (little green) is below


def test_pictures_and_captions_stay_in_memory_and_have_a_fingerprint(folder, encoder, tmp_path):
    """After loading, neither the files nor CLIP are needed; what is loaded is told apart by its content alone."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    first, second = load(folder, encoder), load(copy, encoder)
    shutil.rmtree(copy)
    assert all(torch.equal(a, b) for a, b in zip(twenty(first), twenty(second)))
    assert first.fingerprint == second.fingerprint
    rows = train.read_rows(args_for(folder))
    other_caption = [*rows[:-1], (*rows[-1][:2], "another")]
    other_picture = [*rows[:-1], (rows[-1][0], rows[0][1], rows[-1][2])]
    for changed in (other_caption, other_picture, rows[:-1], rows[::-1]):
        assert train.Pictures(changed, 16, encoder).fingerprint != first.fingerprint


def first_captions(folder):
    return [json.loads(line)["text"] for line in open(folder / "metadata.jsonl")]


def test_states_are_those_of_the_encoder(folder, encoder, pictures):
    captions = dict(zip([f"{i}.png" for i in range(20)], first_captions(folder)))
    names = [Path(picture).name for _, picture, _ in train.read_rows(args_for(folder))]
    states, mask = encoder([captions[name] for name in names])
    _, found, found_mask = twenty(pictures)
    assert torch.equal(found_mask, mask)
    assert torch.allclose(found[mask], states[mask], atol=1e-4)


def test_token_states_take_memory_for_real_tokens_alone(encoder):
    """Padded to the longest, 80,000 captions of a few words and one of 77 tokens would take 12.6 GB."""
    captions = ["a red bird", "word " * 200, *["a bird"] * 30]
    pictures = made_of(captions, encoder)
    lengths = [len(encoder([caption])[0][0]) for caption in [*captions, ""]]
    assert max(lengths) == 77 and pictures.states.shape == (sum(lengths), encoder(["a"])[0].shape[2])
    assert pictures.states.dtype == torch.float32 and pictures.states.untyped_storage().nbytes() < 200 * 128 * 4 * 2


def test_every_batch_is_padded_to_one_length(encoder):
    """Apple's GPU compiles its kernels anew for each shape; padding is never looked at."""
    captions = ["a red bird", "a yellow bird with a long blue tail and wings", "a bird"]
    pictures = made_of(captions, encoder)
    alone = [encoder([caption])[0][0] for caption in [*captions, ""]]
    for rows in ([0], [2, 0], [1, 2], [NO_CAPTION], [0, 1, 2, NO_CAPTION]):
        x_0, states, mask = pictures.batch([0] * len(rows), rows)
        assert states.shape[:2] == mask.shape == (len(rows), max(map(len, alone))) and len(x_0) == len(rows)
        for row, found, real in zip(rows, states, mask):
            assert real.tolist() == [i < len(alone[row]) for i in range(len(real))]
            assert torch.allclose(found[real], alone[row], atol=1e-4)


def test_no_step_of_a_run_has_more_than_a_batch_in_memory(main, monkeypatch):
    """As float32 and padded, all pictures and captions at once would take what `Pictures` saves."""
    batch, sizes = train.Pictures.batch, []

    def watched(pictures, indices, captions):
        sizes.append(len(indices))
        return batch(pictures, indices, captions)
    monkeypatch.setattr(train.Pictures, "batch", watched)
    main("--epochs", 1)
    assert max(sizes) == 4                           # the batch size; two are held out


def test_a_tenth_is_held_out_by_the_seed_and_no_picture_is_on_both_sides(encoder):
    """100 rows of 60 pictures: 40 of them are there twice, under another name, in another format and with a caption."""
    noise = [Image.effect_noise((16, 16), 99).convert("RGB") for _ in range(60)]
    rows = [(f"{i}", encoded(noise[i % 60], format="PNG" if i < 60 else "BMP"), f"number {i}") for i in range(100)]
    several = train.Pictures(rows, 16, encoder)
    training, held_out = (side.tolist() for side in several.split(0))
    assert sorted(training + held_out) == list(range(100))
    assert not {i % 60 for i in training} & {i % 60 for i in held_out} and len({i % 60 for i in held_out}) == 6
    again, other = ([side.tolist() for side in several.split(seed)] for seed in (0, 1))
    assert again == [training, held_out] != other
    alone = train.Pictures(rows[:60], 16, encoder)
    assert [len(side) for side in alone.split(0)] == [54, 6]
    few = train.Pictures(rows[:3], 16, encoder)
    assert [len(side) for side in few.split(0)] == [2, 1]


def test_no_more_are_held_out_than_are_looked_at(encoder, scheduler):
    """Of 400 pictures 32, not a tenth: the others would serve nothing. validate looks at each of them."""
    pictures = made_of(["a bird"] * 399 + ["a red bird"], encoder)
    training, held_out = (side.tolist() for side in pictures.split(0))
    assert len(held_out) == train.MAX_HELD_OUT == 32 and sorted(training + held_out) == list(range(400))
    asked = []

    def network(x_t, t, states, mask):
        asked.extend(zip(x_t, t.tolist()))
        return x_t
    train.validate(network, scheduler, pictures, torch.tensor(held_out), 5, 0)
    assert len(asked) == 3 * 32
    noise = [x_t - scheduler.sqrt_alpha_bar[t] * pictures.batch([row], [row])[0]
             for row, (x_t, t) in zip(held_out * 3, asked)]
    for i, ((_, t), seen) in enumerate(zip(asked, noise)):                       # with each caption the same picture
        assert asked[i % 32][1] == t and torch.allclose(noise[i % 32], seen, atol=1e-5)
        assert 0.5 < (seen / scheduler.sqrt_one_minus_alpha_bar[t]).std() < 1.5
    assert torch.equal(torch.tensor([t for _, t in asked[:32]]) // (1000 / 32), torch.arange(32.0))


# ---------------------------------------------------------------------------------------------- loss

def test_a_training_batch_is_mirrored_at_most_and_loses_some_captions(pictures, scheduler):
    x_0, states, mask = twenty(pictures)
    _, (no_states,), (no_mask,) = pictures.batch([0], [NO_CAPTION])
    rows = torch.arange(20)
    mirrored = dropped = whole = total = 0
    for step in range(50):
        x, s, m, t, noise = train.training_batch(pictures, rows, scheduler, 0.5, generator_for(step))
        uncut = train.training_batch(pictures, rows, scheduler, 0, generator_for(step))[2]
        for i in range(20):
            same, flip = torch.equal(x[i], x_0[i]), torch.equal(x[i], x_0[i].flip(-1))
            assert same or flip                                     # no rotation, no colour jitter
            mirrored += flip
            lost = torch.equal(s[i], no_states)
            assert lost or torch.equal(s[i], states[i])
            full = no_mask if lost else mask[i]
            assert torch.equal(uncut[i], full)
            assert not lost or torch.equal(m[i], no_mask)           # 'no caption' is never cut: sampling shows it whole
            assert 1 <= m[i].sum() <= full.sum() and m[i][:m[i].sum()].all()  # it begins as the caption does
            dropped += lost
            whole += not lost and torch.equal(m[i], full)
            total += 1
        assert torch.equal(torch.sort((t - 1) // 50).values, torch.arange(20))  # t = 1 ... T: one from each twentieth
        assert noise.shape == x.shape and noise.std().item() == pytest.approx(1, abs=0.05)
    assert mirrored / total == pytest.approx(0.5, abs=0.06) and dropped / total == pytest.approx(0.1, abs=0.04)
    at_the_end = (1 / mask.sum(dim=1)).mean().item()                # as often a caption is 'cut' after its last token
    assert whole / (total - dropped) == pytest.approx(0.5 + 0.5 * at_the_end, abs=0.06)


@pytest.mark.parametrize("share", [0.25, 1])
def test_captions_are_cut_as_often_as_asked_for_after_any_of_their_tokens(encoder, scheduler, share):
    pictures = made_of(["a red bird"] * 1000, encoder, different=False)
    n = len(encoder(["a red bird"])[0][0])                          # tokens, with start and end
    _, states, mask, *_ = train.training_batch(pictures, torch.arange(1000), scheduler, share, generator_for(0))
    _, (no_states,), _ = pictures.batch([0], [NO_CAPTION])
    lengths = mask.sum(dim=1)[(states != no_states).any(dim=2).any(dim=1)]
    shares = [(lengths == length).float().mean().item() for length in range(1, n + 1)]
    assert shares[:-1] == pytest.approx([share / n] * (n - 1), abs=0.04) and sum(shares) == pytest.approx(1)
    assert len(lengths) == pytest.approx(900, abs=40)


def test_training_reaches_both_ends_of_the_noise(pictures, scheduler):
    """t = 1 is the least noise that sampling meets, t = T is pure noise; t = 0 would index the clean picture."""
    t = torch.cat([train.training_batch(pictures, torch.arange(20).repeat(50), scheduler, 0, generator_for(i))[3]
                   for i in range(4)])
    assert t.min() == 1 and t.max() == scheduler.num_timesteps and t.dtype == torch.long


def test_the_first_states_of_a_caption_are_those_of_one_that_ends_there(encoder):
    long, short = (encoder([caption])[0][0] for caption in ("a red creature with a blue tail", "a red creature"))
    assert torch.allclose(long[:len(short) - 1], short[:-1], atol=1e-5)  # all but the end token's
    assert not torch.allclose(long[len(short) - 1], short[-1], atol=1e-2)


def test_a_dropped_caption_is_what_sampling_calls_no_caption(pictures, encoder):
    states, mask = encoder(["a red creature", ""])                  # as the sampler encodes its prompts
    _, (no_states,), (no_mask,) = pictures.batch([0], [NO_CAPTION])
    assert torch.allclose(no_states[no_mask], states[NO_CAPTION][mask[NO_CAPTION]], atol=1e-5)


def test_the_loss_is_the_weighted_error_of_the_clean_picture(scheduler):
    x_0, noise, t = torch.rand(10, 3, 8, 8) * 2 - 1, torch.randn(10, 3, 8, 8), torch.arange(10) * 100 + 40
    asked = []

    def network(x_t, t, states, mask):
        asked.append((x_t, t, states, mask))
        return x_0 + 0.1 * torch.arange(10)[:, None, None, None]
    found = train.diffusion_loss(network, scheduler, x_0, "states", "mask", t, noise)
    absolute = [train.L1_WEIGHT * scheduler.alpha_bar[i] for i in t.tolist()]
    expected = [(0.1 * i) ** 2 + weight * 0.1 * i for i, weight in enumerate(absolute)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert torch.equal(asked[0][0], scheduler.add_noise(x_0, noise, t)) and asked[0][1:] == (t, "states", "mask")


def test_validation_repeats_exactly_and_sees_the_caption(pictures, scheduler):
    torch.manual_seed(0)
    unet = UNet(image_size=16, channels=32, context_dim=pictures.states.shape[-1]).eval()
    first = train.validate(unet, scheduler, pictures, torch.arange(10), 4, 0)
    torch.randn(7)
    assert train.validate(unet, scheduler, pictures, torch.arange(10), 4, 0) == first
    assert len(set(first)) == 3
    other_batches = train.validate(unet, scheduler, pictures, torch.arange(10), 10, 0)
    assert first == pytest.approx(other_batches, rel=1e-4)


def shuffled(pictures, held_out, scheduler):
    """The captions that validate shows with each held-out picture as its own and as another's."""
    asked = []

    def network(x_t, t, states, mask):
        asked.extend(row[real].numpy().tobytes() for row, real in zip(states, mask))
        return x_t
    train.validate(network, scheduler, pictures, torch.tensor(held_out), 3, 0)
    right, others, empty = (asked[i * len(held_out):(i + 1) * len(held_out)] for i in range(3))
    assert right == words(pictures, *held_out) and empty == words(pictures, *[NO_CAPTION] * len(held_out))
    return right, others


@pytest.mark.parametrize("captions, held_out", [
    (["one", "two", "three", "four"], [2, 0, 3, 1]),
    (["one", "two", "one", "two"], [1]),                            # a single one is held out
    (["one", "one", "one", "two"], [1]),
    (["one", "one", "two", "three"], [0, 1, 2]),                    # two of the held-out are called the same
    (["one"] * 3 + ["two"] * 2 + ["three"], [0, 1, 2, 3, 4]),
    (["one"] * 5 + ["two"], [0, 1, 2, 3]),                          # all of the held-out are
    (["two"] + ["one"] * 5, [5, 4, 3])])
def test_a_shuffled_caption_reads_differently(encoder, scheduler, captions, held_out):
    pictures = made_of(captions, encoder)
    right, others = shuffled(pictures, held_out, scheduler)
    assert all(a != b for a, b in zip(right, others))
    assert all(words(pictures, NO_CAPTION)[0] != other for other in others)
    if len({captions[i] for i in held_out}) > 1:
        assert set(others) <= set(right)                            # of the held-out ones: none that was trained on


def test_where_all_captions_are_the_same_none_reads_differently(encoder, scheduler):
    right, others = shuffled(made_of(["one"] * 5, encoder), [3, 1], scheduler)
    assert right == others


@pytest.mark.parametrize("steps", [100, 1_000, 10_000])
def test_the_average_spans_the_same_share_of_a_run_of_any_length(steps):
    """A weight that is the share of the run done so far: its average lags behind by a tenth of the run."""
    unet, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(ema.weight, 0)
    for step in range(steps):
        torch.nn.init.constant_(unet.weight, (step + 1) / steps)
        train.update_ema(ema, unet, step)
    assert ema.weight.item() == pytest.approx(0.9, abs=0.01)


def test_the_averages_window_is_a_ninth_of_the_steps_so_far():
    for step in (0, 90, 899_990):
        unet, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        torch.nn.init.constant_(ema.weight, 0), torch.nn.init.constant_(unet.weight, 1)
        train.update_ema(ema, unet, step)
        assert 1 / ema.weight.item() == pytest.approx((10 + step) / 9, rel=1e-4)   # the first step: mostly the new


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = [train.learning_rate(step, 1000, 1e-3) for step in range(1000)]
    assert rates[0] < 5e-5 and max(rates) == pytest.approx(1e-3) and rates[-1] < 1e-5
    assert rates.index(max(rates)) < 100
    for steps in (1, 2, 10, 100_000):                               # of a run of any length
        rates = [train.learning_rate(step, steps, 1) for step in range(steps)]
        assert 0 < min(rates) and 0.5 <= max(rates) <= 1 and rates.index(max(rates)) <= min(steps / 10, 50)


# ---------------------------------------------------------------------------------------------- the steps of a run

def test_the_network_sees_captions_by_what_they_differ_in(main, pictures):
    """Over the tokens of all captions, the attention sees mean 0 and deviation 1, whatever the encoder's scale."""
    networks, seen = [], []

    def look(step, unet, batch):
        networks.append(unet)
        raise Enough
    with pytest.raises(Enough):
        main(look=look)
    rows = torch.tensor([*range(20), NO_CAPTION])
    x_0, states, mask = pictures.batch(rows, rows)
    networks[0].middle.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    networks[0](torch.zeros_like(x_0), torch.ones_like(rows), states, mask)
    dim = states.shape[-1]
    assert states[mask].std(dim=0).max() > 2 * states[mask].std(dim=0).min()
    assert torch.allclose(seen[0][mask].mean(dim=0), torch.zeros(dim), atol=1e-4)
    assert torch.allclose(seen[0][mask].std(dim=0), torch.ones(dim), atol=1e-3)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (12, 12)])
def test_orthogonalize_keeps_the_singular_vectors_and_evens_out_their_values(shape):
    u, values, v = torch.linalg.svd(torch.randn(shape, generator=generator_for(3)), full_matrices=False)
    values = torch.maximum(values, values[:1] / 20)
    found = u.mT @ train.orthogonalize(u @ torch.diag(values) @ v) @ v.mT
    diagonal = found.diagonal()
    assert (found - torch.diag(diagonal)).abs().max() < 1e-4
    assert 0.3 < diagonal.min() and diagonal.max() < 1.3


class Operations(TorchDispatchMode):
    """Within `with`: what torch computes, as (name, its first tensor) in `seen`."""
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.overloadpacket.__name__, next((a for a in args if isinstance(a, torch.Tensor)), None)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_orthogonalize_multiplies_in_bf16_under_autocast_alone(shape, enabled):
    matrix = torch.randn(shape, generator=generator_for(4))
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled), Operations() as operations:
        found = train.orthogonalize(matrix)
    products = {tensor.dtype for name, tensor in operations.seen if name in ("mm", "bmm", "addmm", "baddbmm")}
    assert products == {torch.bfloat16 if enabled else torch.float32}
    norms = [tensor.dtype for name, tensor in operations.seen if "norm" in name]
    assert norms == [torch.float32]                                 # bf16 has too few digits to normalise by
    sums = {tensor.dtype for name, tensor in operations.seen if name == "add"}
    assert found.dtype == (torch.bfloat16 if enabled else torch.float32) and found.dtype in sums
    exact = train.orthogonalize(matrix)
    assert (found - exact).abs().max() < (0.1 if enabled else 1e-9) and exact.dtype == torch.float32


@pytest.mark.parametrize("enabled", [True, False])
def test_a_matrix_and_its_transpose_have_transposed_updates(enabled):
    tall = torch.randn(40, 9, generator=generator_for(5))
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        found, transposed = train.orthogonalize(tall), train.orthogonalize(tall.mT.contiguous())
    assert found.shape == (40, 9) and (found - transposed.mT).abs().max() < (0.03 if enabled else 1e-5)


def test_a_matrix_is_normalised_before_it_is_transposed():
    """Apple's GPU has gone wrong on results that are written through a transposed view."""
    with Operations() as operations:
        train.orthogonalize(torch.randn(20, 6, generator=generator_for(6)))
    divided = [tensor for name, tensor in operations.seen if name == "div"]
    assert [(tensor.shape, tensor.is_contiguous()) for tensor in divided] == [((20, 6), True)]
    products = {tensor.shape for name, tensor in operations.seen if name == "mm"}
    assert products == {(6, 20), (6, 6)}                            # the short side first: less to compute


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_computes_steps_updates_and_sheets_in_the_precision_asked_for(main, monkeypatch, precision):
    seen = {"forward": set(), "update": set()}
    forward, orthogonalize = UNet.forward, train.orthogonalize

    def watched(name, function):
        def call(*args):
            seen[name].add((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            return function(*args)
        return call
    monkeypatch.setattr(UNet, "forward", watched("forward", forward))
    monkeypatch.setattr(train, "orthogonalize", watched("update", orthogonalize))
    monkeypatch.setattr(train, "draw", lambda *args: sample_diffusion.draw(*args, steps=2))
    main("--epochs", 1, "--precision", precision)
    asked = precision == "bf16"
    assert seen == {"forward": {(asked, True), (asked, False)}, "update": {(asked, False)}}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_agrees_with_torchs_own(shape):
    """It computes in bfloat16, and takes nothing but matrices."""
    ours, theirs = (torch.nn.Parameter(torch.randn(shape, generator=generator_for(1))) for _ in range(2))
    start = ours.detach().clone()
    optimizers = [train.Muon([ours], 0.02),
                  torch.optim.Muon([theirs], 0.02, weight_decay=train.WEIGHT_DECAY,
                                   momentum=train.MOMENTUM, ns_steps=train.NEWTON_SCHULZ_STEPS)]
    for step in range(5):
        ours.grad = torch.randn(shape, generator=generator_for(2, step))
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < 0.03 * (ours - start).norm()


def test_every_weight_has_one_optimizer_and_all_but_the_times_matrices_have_muon(pictures):
    unet = UNet(image_size=16, channels=32, context_dim=pictures.states.shape[-1])
    muon, adamw = ([weight for group in optimizer.param_groups for weight in group["params"]]
                   for optimizer in train.optimizers_for(unet, 0.02))
    assert len(muon) + len(adamw) == len(list(unet.parameters())) == len({id(weight) for weight in [*muon, *adamw]})
    assert all(weight.ndim > 1 for weight in muon)
    names = {id(weight): name for name, weight in unet.named_parameters()}
    assert all("time" in names[id(weight)] for weight in adamw if weight.ndim > 1)


def test_gradients_are_clipped(main, monkeypatch):
    monkeypatch.setattr(train, "optimizers_for",
                        lambda unet, lr: [torch.optim.SGD(unet.parameters(), lr)])  # moves by lr * gradient
    weights = []

    def look(step, unet, batch):
        weights.append([weight.detach().clone() for weight in unet.parameters()])
        if step == 1:
            raise Enough
    with pytest.raises(Enough):
        main("--epochs", 1, "--lr", 0.5, look=look, change=lambda step, loss: 1e6 * loss)
    moved = torch.stack([(a - b).norm() for a, b in zip(*weights)]).norm().item()
    peak = 0.5 * (4 / 16) ** 0.5
    assert moved == pytest.approx(train.learning_rate(0, 4, peak) * train.CLIP_NORM, rel=1e-3)


@pytest.mark.parametrize("batch_size, times", [(4, 0.5), (16, 1)])
def test_the_learning_rate_grows_with_the_square_root_of_the_batch_size(main, tmp_path, monkeypatch, batch_size, times):
    monkeypatch.setattr(train, "learning_rate", lambda step, steps, peak: peak)
    main("--epochs", 1, "--batch-size", batch_size, "--lr", 0.01)
    muon, adamw = [optimizer["param_groups"] for optimizer in saved(tmp_path / "run")["optimizers"]]
    assert [group["lr"] for group in muon] == pytest.approx([0.01 * times] * len(muon))
    assert [group["lr"] for group in adamw] == pytest.approx([0.01 * times * train.ADAMW_LR_RATIO] * len(adamw))
    assert float(logged(tmp_path / "run")[0]["lr"]) == pytest.approx(0.01 * times)


def test_every_step_has_its_own_noise_and_a_repeated_run_has_the_same(main):
    def noise(*flags):
        drawn = []

        def look(step, unet, batch):
            drawn.append((batch[-2].tolist(), batch[-1].tolist()))
            if step == 2:
                raise Enough
        with pytest.raises(Enough):
            main(*flags, look=look)
        return drawn
    first = noise()
    assert first[0] != first[1] != first[2] != first[0]
    assert noise() == first != noise("--seed", 1)


def test_an_epoch_takes_each_picture_once_in_an_order_of_its_own(main, pictures):
    def which(x_0):
        """The number of a picture, mirrored or not."""
        found = [i for i, one in enumerate(twenty(pictures)[0])
                 if torch.equal(one, x_0) or torch.equal(one.flip(-1), x_0)]
        assert len(found) == 1
        return found[0]
    taken = []
    main("--batch-size", 8, "--epochs", 2, look=lambda step, unet, batch: taken.extend(map(which, batch[0])))
    first, second = taken[:16], taken[16:]
    assert len(set(first)) == len(set(second)) == 16 and set(first + second) <= set(pictures.split(0)[0].tolist())
    assert first != second


def test_the_order_of_an_epoch_is_drawn_once(main, monkeypatch):
    randperm, drawn = torch.randperm, []
    monkeypatch.setattr(torch, "randperm", lambda n, **more: drawn.append(n) or randperm(n, **more))
    main("--epochs", 2)
    assert drawn.count(18) == 2                                     # all that are trained on; others are of a batch


def test_the_log_has_the_mean_loss_of_all_steps_of_the_epoch(main, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "READ_EVERY", 3)
    losses = []

    def keep(step, loss):
        losses.append(loss.mean().item())
        return loss
    main("--epochs", 2, change=keep)
    rows = logged(tmp_path / "run")
    assert [float(row["train_loss"]) for row in rows] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4],
                                                                       abs=1e-5)


def test_the_average_is_a_copy_that_has_moved(trained):
    checkpoint = saved(trained)
    differ = [name for name, value in checkpoint["model"].items() if not torch.equal(value, checkpoint["ema"][name])]
    assert set(differ) == set(checkpoint["model"]) - {"text_mean", "text_std"}


@pytest.mark.parametrize("change", [lambda step, loss: loss * (math.inf if step == 1 else 1),
                                    lambda step, loss: loss + ((loss * 0).sqrt() if step == 3 else 0)],
                         ids=["loss", "gradient of the last step alone"])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(main, trained, tmp_path, monkeypatch, change):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)                   # even if a checkpoint is due
    out = tmp_path / "run"
    with pytest.raises(UserError, match="not finite at step .*--lr"):
        main("--epochs", 1, change=change)
    assert not list(out.glob("**/*"))
    shutil.copytree(trained, out, dirs_exist_ok=True)
    before = (out / "checkpoint.pt").read_bytes(), (out / "log.csv").read_bytes()
    with pytest.raises(UserError, match="not finite at step .*--lr") as error:
        main("--epochs", 2, "--resume", change=change)
    assert str(out) in str(error.value) and "\n" not in str(error.value)
    assert ((out / "checkpoint.pt").read_bytes(), (out / "log.csv").read_bytes()) == before


def test_a_loss_that_is_not_finite_is_not_saved_by_a_stop_either(main, tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def look(step, unet, batch):
        if step == 1:                                      # whose loss nobody has read yet
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(UserError, match="not finite"):
        main("--epochs", 1, look=look, change=lambda step, loss: loss * (math.nan if step == 1 else 1))
    assert not list(tmp_path.glob("run/*"))


# ---------------------------------------------------------------------------------------------- stopping

def test_a_signal_that_was_ignored_stays_ignored(main, tmp_path):
    """What nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)                    # conftest.py puts it back

    def look(step, unet, batch):
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.raise_signal(signal.SIGHUP)
    main("--epochs", 1, look=look)
    assert saved(tmp_path / "run")["epoch"] == 1


def stop_after(main, steps, *flags, number=signal.SIGINT):
    """A run that gets a signal in the step before it has done so many -> its exit code."""
    def look(step, unet, batch):
        if step == steps - 1:
            signal.raise_signal(number)
    signal.signal(number, signal.SIG_DFL)                           # a shell's `&` or nohup has it ignored
    with pytest.raises(SystemExit) as end:
        main(*flags, look=look)
    return end.value.code


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_wish_to_stop_is_granted_after_the_step(main, tmp_path, capsys, number, code):
    assert stop_after(main, 2, "--epochs", 9, number=number) == code
    assert "--resume" in capsys.readouterr().out and steps_done(tmp_path / "run") == 2


def test_the_early_copy_is_the_average_of_its_time_and_outlives_a_stop(main, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "EARLY", 3 / 8)                      # of 8 steps
    assert stop_after(main, 2, "--epochs", 2) == 130
    assert saved(tmp_path / "run")["early"] is None
    assert stop_after(main, 1, "--epochs", 2, "--resume") == 130
    checkpoint = saved(tmp_path / "run")
    early = numbers(checkpoint["early"])
    assert early == numbers(checkpoint["ema"])
    main("--epochs", 2, "--resume")
    checkpoint = saved(tmp_path / "run")
    assert numbers(checkpoint["early"]) == early != numbers(checkpoint["ema"])


def ends_as(out, other):
    """The two folders hold the same states and the same log, bit for bit."""
    assert numbers(saved(out)) == numbers(saved(other))
    assert numbers(logged(out)) == numbers(logged(other))
    return True


@pytest.mark.parametrize("steps", [3, 4])  # in the middle of an epoch, after its last batch
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(main, straight, tmp_path, steps):
    assert stop_after(main, steps, "--epochs", 2) == 130
    assert steps_done(tmp_path / "run") == steps
    main("--epochs", 2, "--resume")
    assert ends_as(tmp_path / "run", straight)


def test_a_run_that_is_stopped_in_every_step_ends_with_the_same_bits(main, straight, tmp_path):
    for steps in range(1, 9):
        assert stop_after(main, 1, "--epochs", 2, *(["--resume"] if steps > 1 else [])) == 130
        assert steps_done(tmp_path / "run") == steps
    main("--epochs", 2, "--resume")
    assert ends_as(tmp_path / "run", straight)


@pytest.fixture
def checkpoints(monkeypatch, tmp_path):
    """Every checkpoint that a run in tmp_path / "run" writes: (steps, what was in the folder then)."""
    write, kept = train.write_atomically, []

    def watched(path, save):
        write(path, save)
        if path.name == "checkpoint.pt":
            kept.append((steps_done(path.parent), shutil.copytree(path.parent, tmp_path / f"kept {len(kept)}")))
    monkeypatch.setattr(train, "write_atomically", watched)
    return kept


@pytest.mark.parametrize("read_every, steps", [(10, [4, 8, 8]), (3, [3, 4, 7, 8, 8])])
def test_a_checkpoint_is_written_whenever_it_is_time_and_a_killed_run_goes_on_from_it(
        main, straight, tmp_path, checkpoints, monkeypatch, read_every, steps):
    """Whenever the loss is read, also inside an epoch; after the last epoch's validation once more."""
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    monkeypatch.setattr(train, "READ_EVERY", read_every)
    main("--epochs", 2)
    assert [number for number, _ in checkpoints] == steps
    assert all(len(saved(folder)["log"]) == saved(folder)["epoch"] for _, folder in checkpoints)
    assert ends_as(tmp_path / "run", straight)
    shutil.rmtree(tmp_path / "run")
    checkpoints[0][1].rename(tmp_path / "run")                      # as it was when kill -9 came
    # log.csv is written at each epoch's end: it may be ahead of the checkpoint, which holds its own log
    shutil.copy(straight / "log.csv", tmp_path / "run")
    main("--epochs", 2, "--resume")
    assert ends_as(tmp_path / "run", straight)


def test_checkpoints_are_as_far_apart_as_they_should_be(main, checkpoints, monkeypatch):
    """Steps of 30 seconds, a checkpoint every 100."""
    clock = [0]
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter))
    monkeypatch.setattr(train, "SAVE_SECONDS", 100)
    monkeypatch.setattr(train, "READ_EVERY", 1)

    def look(step, unet, batch):
        clock[0] += 30
    main("--epochs", 3, look=look)
    assert [number for number, _ in checkpoints] == [4, 8, 12, 12]


def test_a_short_run_writes_one_checkpoint_at_its_end(main, checkpoints):
    main("--epochs", 2)
    assert train.SAVE_SECONDS == 600 and [number for number, _ in checkpoints] == [8]


def test_a_finished_run_can_be_resumed_and_has_nothing_to_do(main, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    main("--epochs", 1, "--resume")
    assert "done" in capsys.readouterr().out
    assert numbers(saved(tmp_path / "run")) == numbers(saved(trained))


def test_more_epochs_go_on_on_the_longer_curve_whatever_log_csv_says(main, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "log.csv").write_bytes(b"\xff\0,\n1,2,3,4,5,6,7,8,9,10\n")
    main("--epochs", 2, "--resume")
    rows = logged(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["1", "2"] and rows[0] == logged(trained)[0]
    peak = train.parse_args([]).lr * (4 / 16) ** 0.5
    assert float(rows[1]["lr"]) == pytest.approx(train.learning_rate(7, 8, peak), rel=1e-2)


@pytest.fixture
def moved(folder, trained, tmp_path):
    """The run's pictures at another path, and what it wrote -> (pictures, what it wrote)."""
    shutil.copytree(folder, tmp_path / "moved")
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "moved", tmp_path / "run"


def change_a_picture(folder):
    picture = Image.open(folder / "7.png").convert("RGB")
    picture.putpixel((3, 3), (1, 2, 3))
    picture.save(folder / "7.png")


def change_a_caption(folder):
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace('"text": "', '"text": "not ', 1))


@pytest.mark.parametrize("change", [change_a_picture, change_a_caption, lambda folder: None])
def test_a_run_goes_on_with_the_same_pictures_wherever_they_lie_and_with_no_others(main, moved, change):
    pictures, out = moved
    before = {path.name: path.read_bytes() for path in out.glob("*.*")}
    change(pictures)
    if change in (change_a_picture, change_a_caption):
        with pytest.raises(UserError, match="--resume: .*pictures.* captions") as error:
            main("--dataset", pictures, "--epochs", 2, "--resume")
        assert "\n" not in str(error.value)
        assert {path.name: path.read_bytes() for path in out.glob("*.*")} == before
    else:
        main("--dataset", pictures, "--epochs", 2, "--resume")
        assert saved(out)["epoch"] == 2


def test_a_run_goes_on_with_the_settings_of_its_checkpoint(main, straight, tmp_path):
    """Whatever the command line says, whose defaults may have changed as well."""
    stop_after(main, 3, "--epochs", 2)
    main("--epochs", 2, "--resume", "--lr", 0.5, "--channels", 64, "--batch-size", 8, "--image-size", 32,
         "--caption-cut", 0.1, "--seed", 3)
    assert ends_as(tmp_path / "run", straight)


def wider(clip):
    clip.config.hidden_size, clip.config.intermediate_size = 2 * clip.config.hidden_size, 64
    return type(clip)(clip.config)


def shifted(clip):
    next(p for name, p in clip.named_parameters() if name.endswith("final_layer_norm.bias")).data += 1
    return clip


@pytest.mark.parametrize("change", [shifted, wider])
def test_a_run_does_not_go_on_with_another_text_encoder(main, trained, tmp_path, change):
    from transformers import CLIPTextModel
    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    shutil.copytree(TINY_CLIP, tmp_path / "clip")
    change(CLIPTextModel.from_pretrained(TINY_CLIP)).save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match="--resume: .*--text-encoder"):
        main("--epochs", 2, "--resume", "--text-encoder", tmp_path / "clip")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_run_does_not_begin_anew_over_another(main, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match="checkpoint.pt.*--resume.*--output-dir"):
        main("--epochs", 2)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


# ---------------------------------------------------------------------------------------------- whole runs

def test_a_run_writes_what_it_should_and_the_sampler_needs_only_its_checkpoint(straight, tmp_path, monkeypatch, capsys):
    out = straight
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "log.csv", "loss.png", "samples"]
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["epoch_0001.png", "epoch_0002.png"]
    rows = logged(out)
    assert set(rows[0]) == {"epoch", "step", "lr", "seconds", "train_loss", "val_loss", "val_loss_shuffled",
                            "val_loss_empty"} and [row["epoch"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert [int(row["step"]) for row in rows] == [4, 8]  # 18 training pictures in batches of 4

    def sample(*flags):
        sample_diffusion.main([*map(str, flags), "--checkpoint", str(out / "checkpoint.pt"), "--steps", "4",
                               "--device", "cpu"])
        return [tmp_path / line for line in capsys.readouterr().out.splitlines() if line.endswith((".png", ".gif"))]

    monkeypatch.chdir(tmp_path)
    def pixels(path):
        return np.asarray(Image.open(path)).tobytes()
    one = sample("a red creature", "--output", "one.png")
    assert [path.name for path in one] == ["one.png", "one_00.png"] and Image.open(one[1]).size == (16, 16)
    paths = sample("a red creature", "--num-images", 3, "--guidance-scale", 1, sample_diffusion.GUIDANCE_SCALE,
                   "--output", "deep/er/fire.png")
    assert [path.name for path in paths] == ["fire.png"] + [f"fire_{i:02d}.png" for i in range(6)]
    assert all(path.is_file() for path in paths)
    same = sample("a red creature", "--guidance-scale", 1, sample_diffusion.GUIDANCE_SCALE, "--output", "same.png")
    assert pixels(same[2]) == pixels(one[1]) != pixels(same[1])                              # same seed, same picture
    again = sample("a red creature", "--output", "again.png")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in one]
    other = sample("a red creature", "--seed", 1, "--output", "other.png")
    assert pixels(other[1]) != pixels(one[1])
    moving = sample("a red creature", "a tail", "--animate", "--output", "moving.png")
    assert [path.name for path in moving] == ["moving.png", "moving_00.png", "moving_01.png", "moving.gif"]
    with Image.open(moving[-1]) as gif, Image.open(moving[0]) as sheet:
        assert gif.n_frames == 4 and gif.size == sheet.size  # a frame a step, the last the pictures themselves
        difference = []
        for number in range(4):
            gif.seek(number)
            difference.append(np.abs(np.asarray(gif.convert("RGB"), float) - np.asarray(sheet)).mean())
        assert difference[3] < 8 < difference[1] < difference[0]  # of 255; a .gif has 256 colours
        assert difference[3] < difference[2] < difference[1]      # and the noise goes, frame by frame


def test_the_sampler_draws_what_the_last_sheet_of_the_training_shows(small, tmp_path, monkeypatch):
    """By the same functions in the same precision, from the same noise."""
    monkeypatch.setattr(train, "plot_losses", lambda rows, path: None)
    train.main([str(flag) for flag in (*small, "--epochs", 1, "--precision", "fp32")])
    monkeypatch.chdir(tmp_path)
    sample_diffusion.main(["a red creature", "--num-images", str(train.SAMPLES), "--precision", "fp32", "--device",
                           "cpu", "--checkpoint", "run/checkpoint.pt", "--output", "sheet.png"])
    sheets = [np.asarray(Image.open(tmp_path / name)) for name in ("run/samples/epoch_0001.png", "sheet.png")]
    text = Image.open(tmp_path / "run" / "samples" / "epoch_0001.png").text
    assert text["prompt"] == f"epoch 1, guidance {sample_diffusion.GUIDANCE_SCALE}: a red creature"
    assert text["seed"] == "0" and text["steps"] == str(sample_diffusion.STEPS) and text["dataset"] == str(small[1])
    below = slice(sample_diffusion.LABEL, None)
    assert sheets[0].shape == sheets[1].shape and np.array_equal(sheets[0][below], sheets[1][below])


SLOWLY = """
import time, sample_diffusion, train_diffusion as train
loss = train.diffusion_loss
train.diffusion_loss = lambda *inputs: time.sleep(0.3) or loss(*inputs)
sample_diffusion.run(train.main)
"""


def begin(*arguments, cwd, **environment):
    """Start a run that can be interrupted, also if this process can't (a shell's `&` has Ctrl-C ignored)."""
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_ctrl_c_and_resume_as_a_user_does_it(small, straight, tmp_path):
    """From outside, in the second of two epochs; each step waits, so that the signal comes before the run's end."""
    flags = [*small, "--epochs", 2]
    process = begin("-c", SLOWLY, *flags, cwd=tmp_path)
    while not (tmp_path / "run" / "log.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)                     # the first epoch is done
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in out and "Traceback" not in err, err
    assert 4 <= steps_done(tmp_path / "run") < 8
    resumed = run("train_diffusion.py", *flags, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert ends_as(tmp_path / "run", straight)


STUCK = """
import time, sample_diffusion, train_diffusion as train
train.diffusion_loss = lambda *inputs: print("in a step", flush=True) or time.sleep(600)
sample_diffusion.run(train.main)
"""


def test_a_second_ctrl_c_ends_a_run_at_once(small, tmp_path):
    process = begin("-c", STUCK, *small, cwd=tmp_path)
    try:
        while process.stdout.readline() not in ("in a step\n", ""):
            pass
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):     # the first one waits for the step's end
            process.wait(timeout=1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) in (130, -signal.SIGINT)
        assert "Traceback" not in process.communicate()[1] and not (tmp_path / "run" / "checkpoint.pt").exists()
    finally:
        process.kill()


def test_a_run_whose_output_nobody_reads_any_more_goes_on(small, tmp_path):
    """`python train_diffusion.py | head -1`, also with a warning to print, and if Python keeps no line back."""
    (tmp_path / "run" / "loss.png").mkdir(parents=True)
    process = begin(ROOT / "train_diffusion.py", *small, "--epochs", 1, cwd=tmp_path, PYTHONUNBUFFERED="1")
    assert "18 pictures to train on" in process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=120) == 0 and "Traceback" not in said and "BrokenPipe" not in said, said
    assert saved(tmp_path / "run")["epoch"] == 1 and len(logged(tmp_path / "run")) == 1


def test_a_full_disk_leaves_the_last_good_checkpoint(main, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    good = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes of a file: less than a checkpoint
    try:
        with pytest.raises(UserError, match="run/checkpoint.pt could not be written: "):
            main("--epochs", 2, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == good
    assert not list((tmp_path / "run").glob("*tmp*"))


def test_an_output_folder_that_can_not_be_made(main, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output-dir .*run: "):
        main("--epochs", 1, "--output-dir", tmp_path / "file" / "run")


def test_what_can_not_be_written_beside_the_checkpoint_costs_a_warning_each(main, tmp_path, monkeypatch, capsys):
    def no_matplotlib(rows, path):
        raise ImportError("No module named 'matplotlib'")
    monkeypatch.setattr(train, "plot_losses", no_matplotlib)
    (tmp_path / "run" / "log.csv").mkdir(parents=True)
    (tmp_path / "run" / "samples").write_text("a file, where a folder should be")
    main("--epochs", 1)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 3 and all(any(name in line for line in said) for name in ("log.csv", "samples", "loss.png"))
    assert saved(tmp_path / "run")["epoch"] == 1 and not list((tmp_path / "run").glob("**/*tmp*"))


def test_nothing_that_a_run_writes_dirties_the_checkout():
    paths = ["output/pokemon/checkpoint.pt", "output/demo/log.csv", "output/demo/samples/epoch_0010.png",
             "output/sample.png"]
    if (ROOT / ".git").exists():
        ignored = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True).stdout
        assert ignored.split() == paths
    assert train.parse_args([]).output_dir.parts[0] == train.parse_args(["--demo"]).output_dir.parts[0] == "output"


def test_a_batch_larger_than_what_is_left_to_train_on(main, tmp_path):
    with pytest.raises(UserError, match="--batch-size 19: .*18 pictures"):
        main("--batch-size", 19)
    assert not (tmp_path / "run").exists()
