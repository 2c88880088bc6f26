"""How fast and how large: prints a table for this machine, in under five minutes.

    python tests/benchmark.py [--device cuda|mps|cpu] [--precision fp32|bf16]
    python tests/benchmark.py --pictures 8000      # what a larger data set costs: the drawings repeated and tinted

It trains and samples the default network at 64x64 on the drawings in examples/, by the very functions that
train_diffusion.py and sample_diffusion.py use. Medians; the resident memory is the process's highest.
"""
import argparse
import io
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sample_diffusion  # noqa: E402
import train_diffusion as train  # noqa: E402

STEPS, WARMUP = 20, 3
SIDE = {"cpu": 4096, "mps": 4096, "cuda": 8192}  # of the matrices whose product stands for the hardware's limit


def seconds(call, device):
    """Time of one call, to the end of the device's work."""
    started = time.perf_counter()
    call()
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter() - started


def tinted(folder, count):
    """Write a parquet file of `count` drawings, those of examples/ over and over, each time in other colours."""
    import datasets
    from PIL import Image, ImageChops
    rows = train.read_dataset(argparse.Namespace(dataset=train.DEMO["dataset"], image_column="image",
                                                 caption_column=None))
    drawings = [(Image.open(io.BytesIO(row["image"]["bytes"]) if row["image"]["bytes"] else row["image"]["path"])
                 .convert("RGB"), row["text"]) for row in rows]

    def make():
        for number in range(count):
            picture, text = drawings[number % len(drawings)]
            tint = tuple(255 - (number // len(drawings) * prime) % 128 for prime in (7, 31, 61))
            file = io.BytesIO()
            ImageChops.multiply(picture, Image.new("RGB", picture.size, tint)).save(file, "PNG", compress_level=1)
            yield {"image": {"bytes": file.getvalue(), "path": None}, "text": text}

    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    datasets.Dataset.from_generator(make, features=features, cache_dir=folder).to_parquet(f"{folder}/tinted.parquet")


def megabytes():
    """Resident memory in use, without the files that are mapped into it (Linux only): what can't be given back."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return float("nan")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssAnon")) / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--text-encoder", default=train.DEMO["text_encoder"])
    parser.add_argument("--pictures", type=int, help="so many, repeated and tinted, in place of the 400 drawings")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.pictures:
            os.environ["HF_DATASETS_CACHE"] = folder  # not to be kept
            tinted(folder, asked.pictures)
        measure(asked, folder if asked.pictures else train.DEMO["dataset"])


def measure(asked, dataset):
    """Print the table."""
    device = sample_diffusion.pick_device(asked.device)
    args = train.parse_args(["--dataset", dataset, "--text-encoder", asked.text_encoder,
                             "--precision", asked.precision, "--output-dir", "unused"])
    started = time.perf_counter()
    pictures, prompts_text = train.prepare_data(args)
    first_load = time.perf_counter() - started
    load = seconds(lambda: train.prepare_data(args), device)                   # the second time, as the cache is there
    run = train.start(args, device, pictures, prompts_text)
    bf16 = "bfloat16" if isinstance(run.amp, torch.autocast) else "float32"
    order = torch.randperm(len(pictures.rows), generator=train.generator_for(0)).tolist()

    def step(number):
        rows = [order[(number * args.batch_size + i) % len(order)] for i in range(args.batch_size)]
        train.train_step(run, rows, 1e-4)

    with FlopCounterMode(display=False) as counter:
        step(0)
    side = SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=getattr(torch, bf16))
    train_times, product_times = [], []
    for number in range(WARMUP + STEPS):                                      # side by side: the machine may be noisy
        train_times.append(seconds(lambda: step(number), device))
        product_times.append(seconds(lambda: matrix @ matrix, device))
    train_time, product_time = (statistics.median(times[WARMUP:]) for times in (train_times, product_times))
    rate, limit = counter.get_total_flops() / train_time, 2 * side ** 3 / product_time

    states, mask = (part[:1].repeat(4, *[1] * (part.dim() - 1)) for part in prompts_text)
    def sample(steps, scale):
        return seconds(lambda: sample_diffusion.draw(run.ema, run.scheduler, (states, mask), tuple(
            part[-1:] for part in prompts_text), [(0, i) for i in range(4)], steps, scale), device) / 4
    guided = statistics.median(sample(sample_diffusion.STEPS, 3.0) for _ in range(3))

    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    print(f"device               {device}, torch {torch.__version__}, {bf16}")
    print(f"network              {sum(p.numel() for p in run.unet.parameters()) / 1e6:.1f} M parameters")
    print(f"training             {args.batch_size / train_time:.1f} pictures/s in batches of {args.batch_size}, "
          f"{train_time:.3f} s a step")
    print(f"arithmetic           {rate / 1e9:.0f} GFLOP/s in a training step, {rate / limit:.0%} of the "
          f"{limit / 1e9:.0f} of a {side}x{side} matrix product")
    print(f"guided picture       {guided:.2f} s at {sample_diffusion.STEPS} steps, of a batch of 4")
    print(f"loading              {first_load:.1f} s for {len(pictures.rows)} pictures, encoder included; again "
          f"{load:.1f} s")
    print(f"resident memory      {memory:.2f} GB at the highest; now {megabytes() / 1e3:.2f} GB without mapped files")
    if device.type == "cuda":
        print(f"GPU memory           {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
