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

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

import sample_diffusion
import train_diffusion as train
from conftest import ROOT, TINY_CLIP, run, says_one_line
from model import UNet, UNetConfig, generator_for


NEVER = argparse.Namespace(granted=lambda run: 0)  # a StopWish that leaves Ctrl-C to pytest


def args_for(path, **more):
    return argparse.Namespace(**dict(dataset=str(path), image_column="image", caption_column=None), **more)


def load(path, encoder, size=16):
    return train.Pictures(train.read_dataset(args_for(path)), size, encoder, TINY_CLIP)


@pytest.fixture
def pictures(folder, encoder):
    return load(folder, encoder)


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
    order = [sorted(range(20), key=lambda i: pictures.rows[i]["pixels"]) for pictures in found]
    first = found[0].batch(order[0])
    assert first[0].shape == (20, 3, 16, 16) and first[0].min() >= -1 and first[0].max() <= 1
    for pictures, rows in zip(found[1:], order[1:]):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(pictures.batch(rows), first))


def encoded(picture, **options):
    file = io.BytesIO()
    picture.save(file, **{"format": "PNG", **options})
    return {"bytes": file.getvalue(), "path": "picture"}


def middle(image):
    return train.decode(image, 16)[:, 8, 8].tolist()


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
    found = train.decode(image, size)
    assert found.shape == (3, size, size) and found.dtype == np.uint8
    if mode in ("RGB", "RGBX") and format == "PNG" and (width, height) == (size, size) and orientation in (0, 1, 9):
        assert np.array_equal(found, noise.transpose(2, 0, 1))


@given(content=st.binary(max_size=200), cut=st.integers(0, 3000), where=st.integers(0, 3000),
       format=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
@settings(max_examples=300, deadline=None)
def test_a_damaged_picture_is_read_or_named(content, cut, where, format):
    """A property: with bytes overwritten and cut off, a picture is read all the same or said to be unreadable."""
    whole = bytearray(encoded(Image.effect_noise((40, 40), 90).convert("RGB"), format=format)["bytes"])
    whole[where:where + len(content)] = content
    try:
        assert train.decode({"bytes": bytes(whole[cut:]), "path": "a.png"}, 16).shape == (3, 16, 16)
    except ValueError as error:
        assert "picture a.png: can't be read" in str(error)


def test_a_dark_16_bit_picture_stays_dark():
    dark = Image.fromarray(np.full((20, 20), 200, dtype=np.uint16))  # 200 of 65,535 is nearly black
    assert max(middle(encoded(dark))) <= 1


def test_pictures_are_turned_upright_and_cut_to_a_square():
    wide = Image.new("RGB", (40, 20), "white")
    wide.paste("red", (0, 0, 40, 10))                 # red above
    exif = Image.Exif()
    exif[0x0112] = 3                                  # stored upside down
    found = train.decode(encoded(wide, format="JPEG", exif=exif), 16)
    assert found.shape == (3, 16, 16)
    assert found[1, 2, 8] > 200 > 100 > found[1, 13, 8]  # so the red (little green) is below


def test_pictures_are_decoded_and_captions_encoded_once(folder, encoder, tmp_path, monkeypatch):
    """After loading, neither the files nor CLIP are needed; and a second load of the same data does neither."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    first = load(copy, encoder)
    decoded = []
    monkeypatch.setattr(train, "decode", lambda *a: decoded.append(a))
    second = load(copy, encoder)
    shutil.rmtree(copy)
    assert decoded == []
    assert all(torch.equal(a, b) for a, b in zip(first.batch(range(20)), second.batch(range(20))))
    assert first.length == encoder(first_captions(folder))[0].shape[1]  # trimmed to the longest caption, not 77


def first_captions(folder):
    return [json.loads(line)["text"] for line in open(folder / "metadata.jsonl")]


def test_states_are_those_of_the_encoder(folder, encoder, pictures):
    captions = dict(zip([f"{i}.png" for i in range(20)], first_captions(folder)))
    dataset = train.read_dataset(args_for(folder))
    names = [row["image"]["path"].split("/")[-1] for row in dataset]
    states, mask = encoder([captions[name] for name in names])
    _, found, found_mask = pictures.batch(range(20))
    assert torch.equal(found_mask, mask)
    assert torch.allclose(found[mask], states[mask], atol=1e-4)


def test_a_tenth_is_held_out_by_the_seed():
    training, validation = train.split(807, seed=0)
    assert sorted(training + validation) == list(range(807)) and len(validation) == 81
    assert train.split(807, seed=0) == (training, validation) != train.split(807, seed=1)


# ---------------------------------------------------------------------------------------------- loss

def test_a_training_batch_is_mirrored_at_most_and_loses_some_captions(pictures, scheduler):
    x_0, states, mask = pictures.batch(range(20))
    mirrored = dropped = total = 0
    for step in range(50):
        x, s, m, t, noise = train.training_batch(pictures, range(20), scheduler, generator_for(step))
        for i in range(20):
            same, flip = torch.equal(x[i], x_0[i]), torch.equal(x[i], x_0[i].flip(-1))
            assert same or flip                                     # no rotation, no colour jitter
            mirrored += flip
            lost = torch.equal(s[i], pictures.no_text[0]) and torch.equal(m[i], pictures.no_text[1])
            assert lost or torch.equal(s[i], states[i])
            dropped += lost
            total += 1
        assert torch.equal(torch.sort(t // 50).values, torch.arange(20))  # one time from each twentieth
        assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert mirrored / total == pytest.approx(0.5, abs=0.06) and dropped / total == pytest.approx(0.1, abs=0.04)


def test_a_dropped_caption_is_what_sampling_calls_no_caption(pictures, encoder):
    states, mask = encoder([""])
    no_states, no_mask = pictures.no_text
    assert torch.allclose(no_states[no_mask], states[0], atol=1e-5) and no_mask.sum() == mask.sum()


def test_validation_repeats_exactly_and_sees_the_caption(pictures, scheduler):
    torch.manual_seed(0)
    unet = UNet(UNetConfig(image_size=16, channels=32, context_dim=pictures.dim)).eval()
    first = train.validate(unet, scheduler, pictures, list(range(10)), 4, 0)
    torch.randn(7)
    assert train.validate(unet, scheduler, pictures, list(range(10)), 4, 0) == first
    assert len(set(first)) == 3
    other_batches = train.validate(unet, scheduler, pictures, list(range(10)), 10, 0)
    assert first == pytest.approx(other_batches, rel=1e-4)


def test_the_average_follows_a_short_run_and_is_slow_in_a_long_one():
    unet, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.constant_(ema.weight, 0), torch.nn.init.constant_(unet.weight, 1)
    for step in range(20):
        train.update_ema(ema, unet, step)
    assert ema.weight.item() > 0.99
    torch.nn.init.constant_(unet.weight, 0)
    train.update_ema(ema, unet, 1_000_000)
    assert ema.weight.item() == pytest.approx(0.999, abs=1e-3)


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = [train.learning_rate(step, 1000, 1e-3) for step in range(1000)]
    assert rates[0] < 5e-5 and max(rates) == pytest.approx(1e-3) and rates[-1] < 1e-5
    assert rates.index(max(rates)) < 100


# ---------------------------------------------------------------------------------------------- one step

@pytest.fixture
def fresh_run(pictures, tmp_path):
    """What main() makes before its first step."""
    args = train.parse_args(["--image-size", "16", "--channels", "32", "--batch-size", "4", "--precision", "fp32",
                             "--output-dir", str(tmp_path / "run")])
    return train.start(args, torch.device("cpu"), pictures, None)


def test_the_network_sees_captions_by_what_they_differ_in(fresh_run):
    """Over the training captions, the attention sees mean 0 and deviation 1, whatever the encoder's scale."""
    _, states, mask = fresh_run.pictures.batch(range(20))
    seen = []
    fresh_run.unet.middle.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    x, t = torch.zeros(20, 3, 16, 16), torch.zeros(20, dtype=torch.long)
    fresh_run.unet(x, t, states, mask)
    assert states[mask].std(dim=0).max() > 2 * states[mask].std(dim=0).min()
    assert torch.allclose(seen[0][mask].mean(dim=0), torch.zeros(fresh_run.pictures.dim), atol=1e-4)
    assert torch.allclose(seen[0][mask].std(dim=0), torch.ones(fresh_run.pictures.dim), atol=1e-3)
    assert {"text_mean", "text_std"} <= set(fresh_run.ema.state_dict())      # so the sampler has them too


def test_gradients_are_clipped(fresh_run):
    weights = list(fresh_run.unet.parameters())
    fresh_run.optimizer = torch.optim.SGD(weights)  # moves by exactly lr times the gradient
    with torch.no_grad():
        fresh_run.unet.conv_out.weight *= 1000      # far beyond a norm of 1 if left alone
    before = [weight.detach().clone() for weight in weights]
    train.train_step(fresh_run, range(4), lr=1.0)
    moved = torch.stack([(a - b).norm() for a, b in zip(weights, before)]).norm().item()
    assert moved == pytest.approx(1.0, rel=1e-3)


def test_every_step_has_its_own_noise_and_a_repeated_step_has_the_same(fresh_run, monkeypatch):
    drawn, loss = [], train.diffusion_loss

    def look(unet, scheduler, x_0, states, mask, t, noise):
        drawn.append((t.tolist(), noise.flatten().tolist()))
        return loss(unet, scheduler, x_0, states, mask, t, noise)
    monkeypatch.setattr(train, "diffusion_loss", look)
    for _ in range(2):
        train.train_step(fresh_run, range(4), lr=1e-3)
    fresh_run.state["step"] = 0
    train.train_step(fresh_run, range(4), lr=1e-3)
    assert drawn[0] == drawn[2] != drawn[1]


def test_an_epoch_takes_each_picture_once_in_an_order_of_its_own(fresh_run, monkeypatch):
    taken = []

    def look(run, indices, lr):
        taken.append(indices)
        run.state["step"] += 1
        return torch.tensor(0.0)
    monkeypatch.setattr(train, "train_step", look)
    for _ in range(2):
        train.train_epoch(fresh_run, list(range(100, 118)), 8, tqdm(disable=True), NEVER)
        fresh_run.state["epoch"] += 1
    first, second = sum(taken[:4], []), sum(taken[4:], [])
    assert len(set(first)) == len(set(second)) == 16 and set(first + second) <= set(range(100, 118))
    assert first != second


def test_the_average_is_a_copy(fresh_run):
    train.train_step(fresh_run, range(4), lr=1e-3)
    trained, average = fresh_run.unet.state_dict(), fresh_run.ema.state_dict()
    assert any(not torch.equal(trained[name], average[name]) for name in trained)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(fresh_run, tmp_path):
    with torch.no_grad():
        fresh_run.unet.conv_out.bias.fill_(math.inf)
    with pytest.raises(SystemExit, match="not finite at step .*no checkpoint was written yet.*--lr"):
        train.train_epoch(fresh_run, list(range(18)), 100, tqdm(disable=True), NEVER)
    with pytest.raises(SystemExit, match="not finite"):
        train.save(fresh_run, tmp_path / "checkpoint.pt")
    assert not list(tmp_path.glob("**/checkpoint.pt*"))


# ---------------------------------------------------------------------------------------------- whole runs

def test_a_run_writes_what_it_should_and_the_sampler_needs_only_its_checkpoint(small, tmp_path, monkeypatch, capsys):
    done = run("train_diffusion.py", *small, "--epochs", 2, "--sample-every", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "run"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "log.csv", "loss.png", "samples"]
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["epoch_0001.png", "epoch_0002.png"]
    with open(out / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(train.LOG_COLUMNS) and [row["epoch"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert [int(row["step"]) for row in rows] == [4, 8]  # 18 training pictures in batches of 4

    def sample(*flags):
        sample_diffusion.main([*map(str, flags), "--checkpoint", str(out / "checkpoint.pt"), "--steps", "4",
                               "--device", "cpu"])
        return [tmp_path / line for line in capsys.readouterr().out.splitlines() if line.endswith((".png", ".gif"))]

    monkeypatch.chdir(tmp_path)
    one = sample("a red creature", "--output", "one.png")
    assert [path.name for path in one] == ["one.png"] and Image.open(one[0]).size == (16, 16)
    paths = sample("a red creature", "--num-images", 3, "--compare", "--output", "deep/er/fire.png")
    assert [path.name for path in paths] == ["fire.png"] + [f"fire_{i:02d}.png" for i in range(6)]
    assert all(path.is_file() for path in paths)
    assert np.array_equal(np.asarray(Image.open(paths[4])), np.asarray(Image.open(one[0])))  # same seed, same picture
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


def test_a_stopped_and_resumed_run_ends_with_the_same_weights(small, tmp_path):
    whole = run("train_diffusion.py", *small, "--epochs", 2, "--output-dir", tmp_path / "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    straight = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    process = [*small, "--epochs", 2, "--save-every", 1]
    stopped = stop_in_the_second_epoch(process, tmp_path, signal.SIGINT)
    assert stopped.returncode == 130 and "--resume" in stopped.stdout
    assert 0 < torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] < 8
    refused = run("train_diffusion.py", *process, cwd=tmp_path)
    assert says_one_line(refused, "checkpoint.pt", "--resume", "--output-dir")
    resumed = run("train_diffusion.py", *process, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    found = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    for part in ("model", "ema"):
        assert all(torch.equal(found[part][name], value) for name, value in straight[part].items())
    assert found["step"] == straight["step"] == 8 and found["loss_sum"] == straight["loss_sum"]
    with open(tmp_path / "run" / "log.csv") as file, open(tmp_path / "whole" / "log.csv") as other:
        rows = [[(row["epoch"], row["train_loss"], row["val_loss"]) for row in csv.DictReader(f)]
                for f in (file, other)]
    assert rows[0] == rows[1]
    differs = run("train_diffusion.py", *process, "--resume", "--lr", "0.5", cwd=tmp_path)
    assert says_one_line(differs, "--lr is 0.5")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_wish_to_stop_is_granted_after_the_step(small, tmp_path, number, code):
    stopped = stop_in_the_second_epoch([*small, "--epochs", 50], tmp_path, number)
    assert stopped.returncode == code and "--resume" in stopped.stdout and "Traceback" not in stopped.stderr
    assert 4 <= torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] < 200


def stop_in_the_second_epoch(flags, tmp_path, number):
    """Run the script and send it a signal, as a user would, once log.csv shows that the first epoch is done."""
    process = subprocess.Popen([sys.executable, str(ROOT / "train_diffusion.py"), *map(str, flags)], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    while not (tmp_path / "run" / "log.csv").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_a_full_disk_leaves_the_last_good_checkpoint(small, tmp_path):
    first = run("train_diffusion.py", *small, "--epochs", 1, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    good = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    def no_large_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes: less than a checkpoint
    done = run("train_diffusion.py", *small, "--epochs", 2, "--resume", cwd=tmp_path, preexec_fn=no_large_files)
    assert says_one_line(done, tmp_path / "run" / "checkpoint.pt", "could not be written")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == good
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_an_output_folder_that_can_not_be_made(small, tmp_path):
    (tmp_path / "file").write_text("")
    done = run("train_diffusion.py", *small, "--epochs", 1, "--output-dir", tmp_path / "file" / "run", cwd=tmp_path)
    assert says_one_line(done, "--output-dir", tmp_path / "file" / "run", "can be written to")


def test_nothing_that_a_run_writes_dirties_the_checkout():
    paths = ["output/pokemon/checkpoint.pt", "output/demo/log.csv", "output/demo/samples/epoch_0010.png",
             "output/sample.png"]
    if (ROOT / ".git").exists():
        ignored = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True).stdout
        assert ignored.split() == paths
    assert train.parse_args([]).output_dir.parts[0] == train.parse_args(["--demo"]).output_dir.parts[0] == "output"


# ---------------------------------------------------------------------------------------------- several processes

def losses(out):
    return [float(row["train_loss"]) for row in csv.DictReader(open(out / "log.csv"))]


def torchrun(*args, cwd):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                           ROOT / "train_diffusion.py", *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          timeout=300)


def test_two_processes_follow_the_same_loss_as_one(small, tmp_path):
    """20 epochs of one step, of a batch of 18: each process learns from 9 pictures of it."""
    flags = [*small, "--batch-size", 18, "--epochs", 20, "--precision", "fp32", "--sample-every", 20]
    one, two = tmp_path / "one", tmp_path / "two"
    done = run("train_diffusion.py", *flags, "--output-dir", one, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = torchrun(*flags, "--output-dir", two, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done:") == 1                                # one of them writes
    assert len(losses(two)) == 20 and losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert losses(two)[-1] < losses(two)[0]
    averages = [torch.load(out / "checkpoint.pt", weights_only=True)["ema"] for out in (one, two)]
    assert averages[0].keys() == averages[1].keys()                       # either goes on from the other's


def test_the_processes_shares_are_the_batch_with_nothing_lost_or_doubled(fresh_run, monkeypatch):
    seen, loss = [], train.diffusion_loss
    monkeypatch.setattr(train, "diffusion_loss", lambda *inputs: seen.append(inputs[2:]) or loss(*inputs))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)  # there is no other process to ask
    fresh_run.processes = 2
    for fresh_run.rank in (0, 1):
        fresh_run.state["step"] = 0
        train.train_step(fresh_run, range(6), 1e-4)
    generator = generator_for(fresh_run.args.seed, 3, 0)
    whole = train.training_batch(fresh_run.pictures, range(6), fresh_run.scheduler, generator)
    assert len(seen) == 2 and all(len(part) == 3 for share in seen for part in share)
    for part, first, second in zip(whole, *seen):
        assert torch.equal(torch.stack([first, second], dim=1).flatten(0, 1), part)


def test_a_batch_that_two_processes_cannot_share(small, tmp_path):
    done = torchrun(*small, "--batch-size", 5, cwd=tmp_path)
    assert "--batch-size 5 can't be shared by 2 processes" in done.stderr and not (tmp_path / "run").exists()
