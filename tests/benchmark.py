"""Speed and memory on this machine, as the READMEs give them. Takes minutes; not part of the suite.

    python tests/benchmark.py                      # training and sampling
    python tests/benchmark.py --rows 807 8000      # seconds until training can begin, and memory, for so many pictures

Times are medians; run it on an otherwise idle machine. A training rate is also given as a share of the fastest that
this machine does, a product of two large matrices: so the rates of two machines can be compared. --rows uses the tiny
CLIP of examples/ unless --text-encoder names a real one, and pictures of 256x256 pixels.
"""
import argparse
import io
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sample_diffusion as sampling  # noqa: E402
import train_diffusion as train  # noqa: E402
from model import NoiseScheduler, TextEncoder, UNet, autocast, generator_for, pick_device, place  # noqa: E402

TOKENS = 24    # of a caption
SIDE = 2048    # of the matrices whose product is the measure


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


def machine(device):
    """The processor's name, or the GPU's, and the CPU's threads, as text."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        try:  # Linux, where platform.processor() is often empty
            lines = subprocess.run("lscpu", capture_output=True, text=True).stdout.splitlines()
            name = next(line.partition(":")[2].strip() for line in lines if line.startswith("Model name"))
        except (OSError, StopIteration):
            name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def product_rates(device, dtypes):
    """Operations per second of the product of two large matrices, for each dtype: {torch.float32: ...}."""
    rates = {}
    for dtype in dtypes:
        a, b = torch.randn(2, SIDE, SIDE, device=device).to(dtype)
        rates[dtype] = 2 * SIDE ** 3 / median_seconds(device, lambda: a @ b, 5)
        print(f"product of {SIDE}x{SIDE} matrices in {str(dtype)[6:]}: {rates[dtype] / 1e9:.0f} GFLOP/s", flush=True)
    return rates


def training_and_sampling(device, precision):
    """Print pictures per second in training, and seconds per guided picture, at both default settings."""
    amp = autocast(device, precision)
    with amp:
        bf16 = torch.is_autocast_enabled(device.type)
    print(f"precision {'bf16' if bf16 else 'fp32'}")
    rates = product_rates(device, [torch.float32, torch.bfloat16][:1 + bf16])  # bf16 takes minutes where it is emulated
    for name, flags in (("pokemon, 64x64", []), ("demo, 32x32", ["--demo"])):
        args = train.parse_args(flags)
        torch.manual_seed(0)
        unet, ema = (place(UNet(args.image_size, args.channels, 512), device) for _ in range(2))
        ema.eval().requires_grad_(False)
        scheduler, B = NoiseScheduler().to(device), args.batch_size
        shape, states = (B, 3, args.image_size, args.image_size), torch.randn(B, TOKENS, 512)
        batch = [part.to(device) for part in (torch.randn(shape), states, torch.ones(B, TOKENS, dtype=torch.bool),
                                              torch.randint(1, 1001, (B,)), torch.randn(shape))]
        optimizers = train.optimizers_for(unet, args.lr)

        def forward_and_backward():
            """Its arithmetic is what is counted."""
            with amp:
                loss = train.diffusion_loss(unet, scheduler, *batch).mean()
            loss.backward()

        def step():
            """What the training loop does with a batch."""
            forward_and_backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), train.CLIP_NORM)
            for optimizer in optimizers:
                with amp:
                    optimizer.step()
                optimizer.zero_grad()
            train.update_ema(ema, unet, 0)

        with FlopCounterMode(display=False) as counter:
            forward_and_backward()
        seconds = median_seconds(device, step, 10)
        rate = counter.get_total_flops() / seconds
        shares = ", ".join(f"{rate / product:.0%} of the {str(dtype)[6:]} product" for dtype, product in rates.items())
        print(f"{name}: {B / seconds:.1f} pictures per second in training, {B} per step; forward and backward are "
              f"{counter.get_total_flops() / B / 1e9:.1f} GFLOP per picture, {rate / 1e9:.0f} GFLOP/s: {shares}",
              flush=True)
        text = states[:2], torch.ones(2, TOKENS, dtype=torch.bool)
        seconds = median_seconds(device, lambda: sampling.draw(ema, scheduler, text, [0] * 8,
                                                               [(i,) for i in range(8)], amp), 3)
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
    seconds, tokens = time.perf_counter() - started, int(pictures.lengths.max())
    print(f"{rows} pictures, captions of at most {tokens} tokens: {seconds:.0f} seconds, "
          f"peak memory {after / 1e6:.2f} GB, {before / 1e6:.2f} of it before", flush=True)  # Linux counts in kB


def main():
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[])
    parser.add_argument("--text-encoder", default=str(ROOT / "examples" / "tiny_clip"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    print(machine(device), flush=True)
    for rows in args.rows:
        data(rows, args.text_encoder)
    if not args.rows:
        training_and_sampling(device, args.precision)


if __name__ == "__main__":
    main()
