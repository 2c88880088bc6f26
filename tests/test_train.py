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
import threading
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

import sample_diffusion
import train_diffusion as train
from conftest import ROOT, TINY_CLIP, run, says_one_line, small_flags
from model import UNet, UserError, generator_for


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
    return pictures.batch(list(range(20)), list(range(20)))


def numbers(tree):
    """A checkpoint's nested values -> the same with every tensor as bytes, so that == compares bit for bit."""
    if isinstance(tree, dict):
        return {key: numbers(value) for key, value in tree.items() if key != "seconds"}  # it is never the same
    if isinstance(tree, (list, tuple)):
        return [numbers(value) for value in tree]
    return tree.numpy().tobytes() if isinstance(tree, torch.Tensor) else tree


def saved(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def logged(out):
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


class Enough(Exception):
    """Ends a run in the middle of a step, when the test has seen what it wanted."""


@pytest.fixture
def main(small, monkeypatch):
    """main(*flags) -> train_diffusion.main in this process, small, watched, and with nothing drawn."""
    loss = train.diffusion_loss
    monkeypatch.setattr(train, "draw", lambda unet, guide, scheduler, text, rows, seeds, cut:
                        torch.zeros(len(rows), 3, 16, 16, dtype=torch.uint8))
    monkeypatch.setattr(train, "loss_curve", lambda rows: SimpleNamespace(savefig=lambda file: file.write(b"a curve")))

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


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """What a run of one epoch, of four steps, wrote; tests copy the folder."""
    path = tmp_path_factory.mktemp("trained")
    train.main([str(flag) for flag in (*small_flags(folder, path), "--epochs", 1)])
    return path / "run"


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """What a run of two epochs wrote that nothing interrupted."""
    path = tmp_path_factory.mktemp("straight")
    train.main([str(flag) for flag in (*small_flags(folder, path), "--epochs", 2, "--sample-every", 1)])
    return path / "run"


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
    assert first.states.shape[1] == encoder(first_captions(folder))[0].shape[1]  # trimmed to the longest, not 77
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


def test_a_tenth_is_held_out_by_the_seed_and_no_picture_is_on_both_sides(encoder):
    """100 rows of 60 pictures: 40 of them are there twice, under another name, in another format and with a caption."""
    noise = [Image.effect_noise((16, 16), 99).convert("RGB") for _ in range(60)]
    rows = [(f"{i}", encoded(noise[i % 60], format="PNG" if i < 60 else "BMP"), f"number {i}") for i in range(100)]
    several = train.Pictures(rows, 16, encoder)
    training, held_out = several.split(0)
    assert sorted(training + held_out) == list(range(100)) and 10 <= len(held_out) <= 20
    assert not {i % 60 for i in training} & {i % 60 for i in held_out}
    assert several.split(0) == (training, held_out) != several.split(1)
    alone = train.Pictures(rows[:60], 16, encoder)
    assert [len(side) for side in alone.split(0)] == [54, 6]


# ---------------------------------------------------------------------------------------------- loss

def test_a_training_batch_is_mirrored_at_most_and_loses_some_captions(pictures, scheduler):
    x_0, states, mask = twenty(pictures)
    mirrored = dropped = whole = total = 0
    for step in range(50):
        x, s, m, t, noise = train.training_batch(pictures, list(range(20)), scheduler, 0.5, generator_for(step))
        uncut = train.training_batch(pictures, list(range(20)), scheduler, 0, generator_for(step))[2]
        for i in range(20):
            same, flip = torch.equal(x[i], x_0[i]), torch.equal(x[i], x_0[i].flip(-1))
            assert same or flip                                     # no rotation, no colour jitter
            mirrored += flip
            lost = torch.equal(s[i], pictures.states[-1])
            assert lost or torch.equal(s[i], states[i])
            there = pictures.mask[-1] if lost else mask[i]
            assert torch.equal(uncut[i], there)
            assert 1 <= m[i].sum() <= there.sum() and m[i][:m[i].sum()].all()  # it begins as the caption does
            dropped += lost
            whole += torch.equal(m[i], there)
            total += 1
        assert torch.equal(torch.sort(t // 50).values, torch.arange(20))  # one time from each twentieth
        assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert mirrored / total == pytest.approx(0.5, abs=0.06) and dropped / total == pytest.approx(0.1, abs=0.04)
    at_the_end = 0.9 * (1 / mask.sum(dim=1)).mean().item() + 0.1 / 2  # as often a caption is 'cut' after its last token
    assert whole / total == pytest.approx(0.5 + 0.5 * at_the_end, abs=0.06)


def test_the_first_states_of_a_caption_are_those_of_one_that_ends_there(encoder):
    long, short = (encoder([caption])[0][0] for caption in ("a red creature with a blue tail", "a red creature"))
    assert torch.allclose(long[:len(short) - 1], short[:-1], atol=1e-5)  # all but the end token's
    assert not torch.allclose(long[len(short) - 1], short[-1], atol=1e-2)


def test_a_dropped_caption_is_what_sampling_calls_no_caption(pictures, encoder):
    states, mask = encoder([""])
    no_states, no_mask = pictures.states[-1], pictures.mask[-1]
    assert torch.allclose(no_states[no_mask], states[0], atol=1e-5) and no_mask.sum() == mask.sum()


def test_the_loss_is_the_weighted_error_of_the_clean_picture(scheduler):
    x_0, noise, t = torch.rand(10, 3, 8, 8) * 2 - 1, torch.randn(10, 3, 8, 8), torch.arange(10) * 100 + 40
    asked = []

    def network(x_t, t, states, mask):
        asked.append((x_t, t, states, mask))
        return x_0 + 0.1 * torch.arange(10)[:, None, None, None]
    found = train.diffusion_loss(network, scheduler, x_0, "states", "mask", t, noise)
    absolute = [train.L1_WEIGHT * scheduler.alpha_bars[i] for i in t.tolist()]
    expected = [(0.1 * i) ** 2 + weight * 0.1 * i for i, weight in enumerate(absolute)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert torch.equal(asked[0][0], scheduler.add_noise(x_0, noise, t)) and asked[0][1:] == (t, "states", "mask")


def test_validation_repeats_exactly_and_sees_the_caption(pictures, scheduler):
    torch.manual_seed(0)
    unet = UNet(image_size=16, channels=32, context_dim=pictures.states.shape[-1]).eval()
    first = train.validate(unet, scheduler, pictures, list(range(10)), 4, 0)
    torch.randn(7)
    assert train.validate(unet, scheduler, pictures, list(range(10)), 4, 0) == first
    assert len(set(first)) == 3
    other_batches = train.validate(unet, scheduler, pictures, list(range(10)), 10, 0)
    assert first == pytest.approx(other_batches, rel=1e-4)


def test_the_average_follows_a_short_run_and_is_slow_in_a_long_one():
    unet, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.constant_(ema.weight, 0), torch.nn.init.constant_(unet.weight, 1)
    train.update_ema(ema, unet, 0)
    assert ema.weight.item() == pytest.approx(0.9)       # after the first step: mostly the new weights
    for step in range(1, 20):
        train.update_ema(ema, unet, step)
    assert ema.weight.item() > 0.99
    torch.nn.init.constant_(unet.weight, 0)
    train.update_ema(ema, unet, 1_000_000)
    assert ema.weight.item() == pytest.approx(train.EMA_DECAY, abs=1e-3)


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = [train.learning_rate(step, 1000, 1e-3) for step in range(1000)]
    assert rates[0] < 5e-5 and max(rates) == pytest.approx(1e-3) and rates[-1] < 1e-5
    assert rates.index(max(rates)) < 100


# ---------------------------------------------------------------------------------------------- the steps of a run

def test_the_network_sees_captions_by_what_they_differ_in(main, pictures):
    """Over the training captions, the attention sees mean 0 and deviation 1, whatever the encoder's scale."""
    networks, seen = [], []

    def look(step, unet, batch):
        networks.append(unet)
        raise Enough
    with pytest.raises(Enough):
        main(look=look)
    training, _ = pictures.split(0)
    _, states, mask = pictures.batch(training, training)
    networks[0].middle.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    networks[0](torch.zeros(18, 3, 16, 16), torch.zeros(18, dtype=torch.long), states, mask)
    dim = states.shape[-1]
    assert states[mask].std(dim=0).max() > 2 * states[mask].std(dim=0).min()
    assert torch.allclose(seen[0][mask].mean(dim=0), torch.zeros(dim), atol=1e-4)
    assert torch.allclose(seen[0][mask].std(dim=0), torch.ones(dim), atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 6, 20), (3, 20, 6), (3, 12, 12)])
def test_orthogonal_keeps_the_singular_vectors_and_evens_out_their_values(shape):
    u, values, v = torch.linalg.svd(torch.randn(shape, generator=generator_for(3)), full_matrices=False)
    values = torch.maximum(values, values[:, :1] / 20)
    found = u.mT @ train.orthogonal(u @ torch.diag_embed(values) @ v) @ v.mT
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert (found - torch.diag_embed(diagonal)).abs().max() < 1e-4
    assert 0.3 < diagonal.min() and diagonal.max() < 1.3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_agrees_with_torchs_own(shape):
    """It computes in bfloat16, and takes nothing but matrices."""
    ours, theirs = (torch.nn.Parameter(torch.randn(shape, generator=generator_for(1))) for _ in range(2))
    start = ours.detach().clone()
    optimizers = [train.Muon([ours], 0.02), torch.optim.Muon([theirs], 0.02, weight_decay=train.WEIGHT_DECAY,
                                                             momentum=train.MOMENTUM, ns_steps=train.ITERATIONS)]
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
    assert moved == pytest.approx(train.learning_rate(0, 4, 0.5) * train.CLIP_NORM, rel=1e-3)


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
    assert len(set(first)) == len(set(second)) == 16 and set(first + second) <= set(pictures.split(0)[0])
    assert first != second


def test_the_average_is_a_copy_that_has_moved(trained):
    checkpoint = saved(trained)
    differ = [name for name, value in checkpoint["model"].items() if not torch.equal(value, checkpoint["ema"][name])]
    assert set(differ) == set(checkpoint["model"]) - {"text_mean", "text_std"}


@pytest.mark.parametrize("change", [lambda step, loss: loss * (math.inf if step == 1 else 1),
                                    lambda step, loss: loss + ((loss * 0).sqrt() if step == 3 else 0)],
                         ids=["loss", "gradient of the last step alone"])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(main, trained, tmp_path, change):
    out = tmp_path / "run"
    with pytest.raises(UserError, match="not finite at step .*no checkpoint was written yet.*--lr"):
        main("--epochs", 1, change=change)
    assert not list(out.glob("**/*"))
    shutil.copytree(trained, out, dirs_exist_ok=True)
    before = (out / "checkpoint.pt").read_bytes(), (out / "log.csv").read_bytes()
    with pytest.raises(UserError, match="not finite at step .*the last good checkpoint is .*checkpoint.pt"):
        main("--epochs", 2, "--resume", change=change)
    assert ((out / "checkpoint.pt").read_bytes(), (out / "log.csv").read_bytes()) == before


def test_a_loss_that_is_not_finite_is_not_saved_by_a_stop_either(main, tmp_path):
    def look(step, unet, batch):
        if step == 1:                                      # whose loss nobody has read yet
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(UserError, match="not finite"):
        main("--epochs", 1, look=look, change=lambda step, loss: loss * (math.nan if step == 1 else 1))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- stopping

def test_the_first_ctrl_c_asks_and_the_second_ends_at_once():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with train.StopRequest() as stop:
        assert stop.agreed("cpu", 1) == 0
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed("cpu", 1) == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_handlers_are_put_back_and_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    ours = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Enough), train.StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.agreed("cpu", 1) == 0
            signal.raise_signal(signal.SIGTERM)
            assert stop.agreed("cpu", 1) == signal.SIGTERM
            raise Enough
        assert signal.getsignal(signal.SIGTERM) == ours and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_needs_no_signals():
    found = []

    def work():
        with train.StopRequest() as stop:
            found.append(stop.agreed("cpu", 1))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0]


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost(monkeypatch):
    with train.StopRequest() as stop:
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "all_reduce", lambda *_: signal.raise_signal(signal.SIGINT))
            first = stop.agreed("cpu", 2)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
        assert first == 0 and stop.agreed("cpu", 2) == signal.SIGINT
    with train.StopRequest() as stop:  # the other process's
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, _: tensor.fill_(15))
        assert stop.agreed("cpu", 2) == 15


def stop_after(main, steps, *flags, number=signal.SIGINT):
    """A run that gets a signal in the step before it has done so many -> its exit code."""
    def look(step, unet, batch):
        if step == steps - 1:
            signal.raise_signal(number)
    with pytest.raises(SystemExit) as end:
        main(*flags, look=look)
    return end.value.code


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_wish_to_stop_is_granted_after_the_step(main, tmp_path, capsys, number, code):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("this signal is ignored, as under nohup, and so it is by the run")
    assert stop_after(main, 2, "--epochs", 9, number=number) == code
    assert "--resume" in capsys.readouterr().out and saved(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("steps", [1, 4, 6])  # in the first epoch, at its end, in the second
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(main, straight, tmp_path, steps):
    assert stop_after(main, steps, "--epochs", 2) == 130
    assert saved(tmp_path / "run")["step"] == steps
    main("--epochs", 2, "--resume")
    assert numbers(saved(tmp_path / "run")) == numbers(saved(straight))
    assert numbers(logged(tmp_path / "run")) == numbers(logged(straight))


def test_the_guide_is_the_average_as_it_was_early_in_the_run(main, straight, tmp_path, monkeypatch):
    assert numbers(saved(straight)["guide"]) == numbers(saved(straight)["ema"])  # in a short run
    monkeypatch.setattr(train, "GUIDE_STEPS", 2)
    assert stop_after(main, 2, "--epochs", 2) == 130
    early = saved(tmp_path / "run")
    main("--epochs", 2, "--resume")
    end = saved(tmp_path / "run")
    assert numbers(end["guide"]) == numbers(early["guide"]) == numbers(early["ema"])
    assert numbers(end["ema"]) == numbers(saved(straight)["ema"])


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
    assert float(rows[1]["lr"]) == pytest.approx(train.learning_rate(7, 8, train.parse_args([]).lr), rel=1e-2)


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
        with pytest.raises(UserError, match="--resume: .*pictures or captions") as error:
            main("--dataset", pictures, "--epochs", 2, "--resume")
        assert "\n" not in str(error.value)
        assert {path.name: path.read_bytes() for path in out.glob("*.*")} == before
    else:
        main("--dataset", pictures, "--epochs", 2, "--resume")
        assert saved(out)["epoch"] == 2


def test_a_run_goes_on_only_as_it_began(main, trained, tmp_path):
    from transformers import CLIPTextModel
    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    other = CLIPTextModel.from_pretrained(TINY_CLIP)
    shutil.copytree(TINY_CLIP, tmp_path / "clip")
    next(p for name, p in other.named_parameters() if name.endswith("final_layer_norm.bias")).data += 1
    other.save_pretrained(tmp_path / "clip")
    for flags, named in [(["--lr", 0.5], "--lr is 0.5, was 0.015"), (["--channels", 64], "--channels is 64, was 32"),
                         (["--seed", 3], "--seed is 3, was 0"),
                         (["--text-encoder", tmp_path / "clip"], "text-encoder")]:
        with pytest.raises(UserError, match=named):
            main("--epochs", 2, "--resume", *flags)
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
    one = sample("a red creature", "--output", "one.png")
    assert [path.name for path in one] == ["one.png"] and Image.open(one[0]).size == (16, 16)
    paths = sample("a red creature", "--num-images", 3, "--guidance-scale", 1, sample_diffusion.GUIDANCE_SCALE,
                   "--output", "deep/er/fire.png")
    assert [path.name for path in paths] == ["fire.png"] + [f"fire_{i:02d}.png" for i in range(6)]
    assert all(path.is_file() for path in paths)
    same = sample("a red creature", "--guidance-scale", 1, sample_diffusion.GUIDANCE_SCALE, "--output", "same.png")
    assert same[2].read_bytes() == one[0].read_bytes() != same[1].read_bytes()               # same seed, same picture
    again = sample("a red creature", "--output", "again.png")
    assert again[0].read_bytes() == one[0].read_bytes()
    other = sample("a red creature", "--seed", 1, "--output", "other.png")
    assert other[0].read_bytes() != one[0].read_bytes()
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


SLOWLY = """
import time, model, train_diffusion as train
loss = train.diffusion_loss
train.diffusion_loss = lambda *inputs: time.sleep(0.5) or loss(*inputs)
model.run(train.main)
"""


def test_ctrl_c_and_resume_as_a_user_does_it(small, straight, tmp_path):
    """From outside, in the second of two epochs; each step waits, so that the signal comes before the run's end."""
    flags = [*small, "--epochs", 2]
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, *map(str, flags)], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not (tmp_path / "run" / "log.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)                     # the first epoch is done
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in out and "Traceback" not in err, err
    assert 4 <= saved(tmp_path / "run")["step"] < 8
    refused = run("train_diffusion.py", *flags, cwd=tmp_path)
    assert says_one_line(refused, "error: ", "checkpoint.pt", "--resume", "--output-dir")
    resumed = run("train_diffusion.py", *flags, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert saved(tmp_path / "run")["step"] == 8
    assert numbers(saved(tmp_path / "run")) == numbers(saved(straight))


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
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_an_output_folder_that_can_not_be_made(main, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output-dir .*run.*can be written to"):
        main("--epochs", 1, "--output-dir", tmp_path / "file" / "run")


def test_what_can_not_be_written_beside_the_checkpoint_costs_a_warning_each(main, tmp_path, monkeypatch, capsys):
    def no_matplotlib(rows):
        raise ImportError("No module named 'matplotlib'")
    monkeypatch.setattr(train, "loss_curve", no_matplotlib)
    (tmp_path / "run" / "log.csv").mkdir(parents=True)
    (tmp_path / "run" / "samples").write_text("a file, where a folder should be")
    main("--epochs", 1)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(said) == 3 and all(any(name in line for line in said) for name in ("log.csv", "samples", "loss.png"))
    assert saved(tmp_path / "run")["epoch"] == 1 and not list((tmp_path / "run").glob("**/*.tmp"))


def test_nothing_that_a_run_writes_dirties_the_checkout():
    paths = ["output/pokemon/checkpoint.pt", "output/demo/log.csv", "output/demo/samples/epoch_0010.png",
             "output/sample.png"]
    if (ROOT / ".git").exists():
        ignored = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True).stdout
        assert ignored.split() == paths
    assert train.parse_args([]).output_dir.parts[0] == train.parse_args(["--demo"]).output_dir.parts[0] == "output"


# ---------------------------------------------------------------------------------------------- several processes

def losses(out):
    return [float(row["train_loss"]) for row in logged(out)]


def torchrun(*args, cwd):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                           ROOT / "train_diffusion.py", *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          timeout=300)


def test_two_processes_follow_the_same_loss_as_one(small, main, tmp_path):
    """20 epochs of one step, of a batch of 18: each process learns from 9 pictures of it.

    At 16x16 pixels the deepest level has a single position, whose normalisation would magnify every rounding error.
    """
    flags = [*small, "--batch-size", 18, "--epochs", 20, "--precision", "fp32", "--sample-every", 20, "--lr", 1e-4,
             "--image-size", 32]
    one, two = tmp_path / "one", tmp_path / "two"
    main(*flags[len(small):], "--output-dir", one)
    done = torchrun(*flags, "--output-dir", two, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done:") == 1                                # one of them writes
    assert len(losses(two)) == 20 and losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert losses(two)[-1] < losses(two)[0]
    averages = [torch.load(out / "checkpoint.pt", weights_only=True)["ema"] for out in (one, two)]
    assert averages[0].keys() == averages[1].keys()                       # either goes on from the other's


def test_the_processes_shares_are_the_batch_with_nothing_lost_or_doubled(main, pictures, scheduler, monkeypatch):
    seen = []

    def look(step, unet, batch):
        seen.append(batch)
        raise Enough
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)  # there is no other process
    monkeypatch.setattr(train, "DistributedDataParallel", lambda unet, *_, **__: unet)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    for rank, processes in [(0, 2), (1, 2), (0, 1)]:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        with pytest.raises(Enough):
            main("--batch-size", 6, look=look)
    first, second, whole = seen
    assert [len(part) for part in whole] == [6] * 5
    for mine, other, part in zip(first, second, whole):
        assert len(mine) == 3 and torch.equal(torch.stack([mine, other], dim=1).flatten(0, 1), part)


def test_a_batch_that_two_processes_cannot_share(main, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--batch-size 5 can't be shared by 2 processes"):
        main("--batch-size", 5)
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_what_is_left_to_train_on(main, tmp_path):
    with pytest.raises(UserError, match="--batch-size 19: .*18 pictures"):
        main("--batch-size", 19)
    assert not (tmp_path / "run").exists()
