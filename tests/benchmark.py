"""Speed and memory on this machine, as the READMEs give them. Takes minutes; not part of the suite.

    python tests/benchmark.py                      # training and sampling
    python tests/benchmark.py --rows 807 8000      # seconds until training can begin, and memory, for so many pictures

Times are medians; run it on an otherwise idle machine. --rows uses the tiny CLIP of examples/ unless --text-encoder
names a real one, and pictures of 256x256 pixels.
"""
import argparse
import io
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sample_diffusion as sampling  # noqa: E402
import train_diffusion as train  # noqa: E402
from model import NoiseScheduler, TextEncoder, UNet, autocast, generator_for, pick_device  # noqa: E402

TOKENS = 24  # of a caption


def wait(device):
    """Return when the device has done all that it was asked for."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def median_seconds(device, work, times):
    """How long work() takes, after one call to warm up."""
    seconds = []
    for _ in range(times + 1):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def training_and_sampling(device, precision):
    """Print pictures per second in training, and seconds per guided picture, at both default settings."""
    for name, flags in (("pokemon, 64x64", []), ("demo, 32x32", ["--demo"])):
        args = train.parse_args(flags)
        torch.manual_seed(0)
        unet, scheduler = UNet(args.image_size, args.channels, 512).to(device), NoiseScheduler().to(device)
        B, ema = args.batch_size, UNet(args.image_size, args.channels, 512).to(device)
        shape, states = (B, 3, args.image_size, args.image_size), torch.randn(B, TOKENS, 512)
        batch = [part.to(device) for part in (torch.randn(shape), states, torch.ones(B, TOKENS, dtype=torch.bool),
                                              torch.randint(0, 1000, (B,)), torch.randn(shape))]
        optimizers = train.optimizers_for(unet, args.lr)

        def step():
            """What the training loop does with a batch."""
            with autocast(device, precision):
                loss = train.diffusion_loss(unet, scheduler, *batch).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), train.CLIP_NORM)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            train.update_ema(ema, unet, 0)

        seconds = median_seconds(device, step, 10)
        print(f"{name}: {B / seconds:.1f} pictures per second in training, {B} per step", flush=True)
        text = states[:1], torch.ones(1, TOKENS, dtype=torch.bool)
        seconds = median_seconds(device, lambda: sampling.draw(unet.eval(), unet, scheduler, text, [0] * 8,
                                                               [(i,) for i in range(8)], 0.5), 3)
        print(f"{name}: {seconds / 8:.2f} seconds per guided picture of {sampling.STEPS} steps, 8 at once", flush=True)


def data(rows, encoder_name):
    """Print how long reading and encoding that many pictures takes, and the process's peak memory."""
    files = []
    for i in range(100):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG")
        files.append(file.getvalue())
    words = (ROOT / "examples" / "creatures" / "metadata.jsonl").read_text().split()[2:12]
    captions = [" ".join(words[torch.randint(len(words), (), generator=generator_for(i, j))] for j in range(8))
                for i in range(100)]
    encoder, started = TextEncoder(encoder_name), time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pictures = train.Pictures([(f"{i}", files[i % 100], captions[i % 100]) for i in range(rows)], 64, encoder)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, tokens = time.perf_counter() - started, pictures.states.shape[1]
    print(f"{rows} pictures, captions of at most {tokens} tokens: {seconds:.0f} seconds, "
          f"peak memory {after / 1e6:.2f} GB, {before / 1e6:.2f} of it before", flush=True)  # Linux counts in kB


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[])
    parser.add_argument("--text-encoder", default=str(ROOT / "examples" / "tiny_clip"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    for rows in args.rows:
        data(rows, args.text_encoder)
    if not args.rows:
        training_and_sampling(device, args.precision)


if __name__ == "__main__":
    main()
