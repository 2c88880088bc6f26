"""Train a text-to-image diffusion model from scratch on captioned pictures.

    python train_diffusion.py                          # the pokemon drawings of the Hugging Face Hub, at 64x64
    python train_diffusion.py --demo                   # the drawings in examples/: no download, a few minutes
    python train_diffusion.py --dataset my_pictures    # a folder of pictures and captions
    python train_diffusion.py --resume                 # go on where the last run stopped
    torchrun --nproc-per-node=2 train_diffusion.py     # on two GPUs; --batch-size stays the size of the whole batch

It writes to --output-dir: checkpoint.pt, log.csv (a row an epoch), loss.png and samples/epoch_0010.png ...
"""
import argparse
import csv
import io
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import NoiseScheduler, UNet, UNetConfig, generator_for, per_picture
from sample_diffusion import (FORMAT, check_writable, contact_sheet, draw, first_line, fits, load_checkpoint,
                              load_encoder, pick_device, save_picture, seed_number, use_cache_if_unreachable, ways_out,
                              whole_number, write_atomically)

EXAMPLES = Path(__file__).resolve().parent / "examples"
DEMO = dict(dataset=str(EXAMPLES / "creatures"), text_encoder=str(EXAMPLES / "tiny_clip"),  # what --demo sets:
            image_size=32, channels=64, epochs=44, batch_size=16, lr=3e-3, sample_every=10,    # minutes on 2 CPU cores
            prompts=["a red creature with a blue tail", "a green creature with yellow wings"])

CAPTION_COLUMNS = ("en_text", "text", "caption")  # looked for in this order; en_text is the pokemon drawings'
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_DROPOUT = 0.1    # of the training examples lose their caption, so that 'no caption' is learned too (CFG)
VALIDATION_SHARE = 0.1   # of the pictures are never trained on ...
VALIDATION_MOST = 64     # ... and at most so many of them are looked at after each epoch
WARMUP_STEPS = 50        # the learning rate rises over these, then falls on a cosine
EMA_LIMIT = 0.999        # the average of the weights forgets over 1 / (1 - 0.999) = 1,000 steps at the most
CLIP_NORM = 1.0          # gradients longer than this are shortened to it
SAMPLES = 6              # pictures of each prompt on a sample sheet
READ_EVERY = 10          # steps between readings of the loss: each waits for the device
LOG_COLUMNS = ("epoch", "step", "train_loss", "val_loss", "lr", "seconds", "val_loss_shuffled", "val_loss_empty")
MUST_MATCH = ("dataset", "text_encoder", "image_size", "channels", "batch_size", "lr", "seed")  # to go on with a run


# ---------------------------------------------------------------------------------------------- arguments

def parse_args(argv=None):
    """Command line -> namespace; argparse itself names a wrong flag and exits with 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="svjack/pokemon-blip-captions-en-zh",
        help="hub name or folder: pictures with metadata.jsonl or .csv (file_name, text), parquet files, or "
             "pictures each with a .txt of the same name")
    add("--image-column", default="image", help="column that holds the pictures")
    add("--caption-column", help="column that holds the captions; if not given, the first of "
                                 + ", ".join(CAPTION_COLUMNS) + " that is there")
    add("--text-encoder", default="openai/clip-vit-base-patch32", help="hub name or folder of a CLIP text encoder")
    add("--demo", action="store_true", help="train a small model on the drawings in examples/, without a network")
    add("--image-size", type=whole_number, default=64, help="pixels a side")
    add("--channels", type=whole_number, default=UNetConfig.channels, help="width of the UNet's first level")
    add("--epochs", type=whole_number, default=300, help="passes over the training pictures, in all")
    add("--batch-size", type=whole_number, default=8, help="pictures a step")
    add("--lr", type=float, default=2e-3, help="highest learning rate of AdamW")
    add("--prompts", nargs="+", default=["a water type pokemon", "a dragon character with tail"],
        help="what the sample sheets show")
    add("--sample-every", type=whole_number, default=10, help="epochs between sample sheets")
    add("--save-every", type=whole_number, default=10, help="epochs between checkpoints")
    add("--output-dir", type=Path, help="where all is written; if not given, output/ and the data set's name")
    add("--resume", action="store_true", help="go on from the checkpoint in --output-dir")
    add("--seed", type=seed_number, default=0, help="of the weights, the validation pictures and all noise")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu), cuda, mps or cpu")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="auto is bf16 where CUDA or the CPU has it in hardware, else fp32")
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if not 0 < args.lr <= 1:
        parser.error(f"--lr: {args.lr} is not above 0 and at most 1")
    config = UNetConfig(image_size=args.image_size, channels=args.channels)
    if args.image_size % config.stride or args.image_size > 1024:
        parser.error(f"--image-size: {args.image_size} is not a multiple of {config.stride} up to 1024")
    if args.channels % 32 or args.channels > 1024:
        parser.error(f"--channels: {args.channels} is not a multiple of 32 up to 1024")
    if args.output_dir is None:
        args.output_dir = Path("output") / ("demo" if args.demo else Path(args.dataset).name)
    return args


def autocast(device, precision):
    """What the forward pass runs under: nothing for fp32; for bf16 torch.autocast."""
    if precision == "auto":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.10 can't be asked: fp32
        in_hardware = {"cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
                       "cpu": capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"),
                       "mps": False}                                   # there, bf16 was measured slower than fp32
        precision = "bf16" if in_hardware[device.type] else "fp32"
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


# ---------------------------------------------------------------------------------------------- data

def read_dataset(args):
    """--dataset -> datasets.Dataset with the columns `image` (undecoded) and `text`; exits with one line if wrong."""
    import datasets  # here, not above: it reads at its import whether the hub is to be used
    folder = Path(args.dataset)
    try:
        dataset = open_folder(folder) if folder.is_dir() else datasets.load_dataset(args.dataset)
    except (OSError, LookupError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        if folder.exists():
            sys.exit(f"error: --dataset {args.dataset}: {first_line(error)}")
        sys.exit(f"error: --dataset: {ways_out(args.dataset, '--dataset')}")
    if isinstance(dataset, dict):  # a DatasetDict, as the hub gives it
        if "train" not in dataset:
            sys.exit(f"error: --dataset {args.dataset}: no split 'train', only {', '.join(dataset)}")
        dataset = dataset["train"]

    columns, wanted = dataset.column_names, args.caption_column
    if args.image_column not in columns:
        sys.exit(f"error: --image-column: {args.dataset} has no column {args.image_column!r}, only {columns}")
    if wanted is None:
        wanted = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if wanted not in columns:
        sys.exit(f"error: --caption-column: {args.dataset} has no column {wanted or CAPTION_COLUMNS!r}, only {columns}")
    if not isinstance(dataset.features[args.image_column], datasets.Image):
        sys.exit(f"error: --image-column: column {args.image_column!r} of {args.dataset} holds no pictures, but "
                 f"{dataset.features[args.image_column]}")
    dataset = dataset.select_columns([args.image_column, wanted])
    dataset = dataset.rename_columns({old: new for old, new in ((args.image_column, "image"), (wanted, "text"))
                                      if old != new})
    return dataset.cast_column("image", datasets.Image(decode=False))


def open_folder(folder):
    """A local folder in one of the three layouts that the README names -> datasets.Dataset. Raises ValueError."""
    import datasets
    if parquet := sorted(str(path) for path in folder.rglob("*.parquet")):
        return datasets.load_dataset("parquet", data_files=parquet, split="train")
    if any(next(folder.rglob(f"metadata.{suffix}"), None) for suffix in ("jsonl", "csv")):
        return datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not pictures:
        raise ValueError("no metadata.jsonl or metadata.csv, no .parquet file and no picture in this folder")
    rows = {"image": [str(path) for path in pictures], "text": [read_caption(path) for path in pictures]}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def read_caption(picture):
    """The text in the .txt beside a picture. Raises ValueError where there is none."""
    path = picture.with_suffix(".txt")
    if not path.is_file():
        raise ValueError(f"{picture.name} has no caption: expected {path.name} beside it, or one metadata.jsonl or "
                         "metadata.csv with the columns file_name and text")
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is no text in UTF-8") from error


def to_rgb(picture):
    """Any PIL picture -> upright RGB, with what is transparent laid on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):                                      # 16 bits of grey, which PIL would clip at 255
        picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def decode(image, size):
    """{'bytes', 'path'} of a dataset's row -> uint8 array (3, size, size). The longer side is cut at both ends."""
    try:
        with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as picture:
            square = ImageOps.fit(to_rgb(picture), (size, size), Image.Resampling.BILINEAR)  # antialiased by PIL
    except Exception as error:  # PIL's readers of some twenty formats raise whatever a damaged file leads them to
        raise ValueError(f"picture {image and image['path']}: can't be read: {first_line(error)}") from error
    return np.asarray(square).transpose(2, 0, 1)


class Pictures:
    """Captioned pictures, decoded, resized and encoded once, kept by `datasets` in a file that is mapped into memory.

    So a second run starts at once, and memory does not grow with the number of pictures.
    """

    def __init__(self, dataset, size, encoder, encoder_name):
        from datasets.fingerprint import Hasher
        if not len(dataset):
            raise ValueError("no pictures in it")
        self.size, self.dim = size, encoder.dim
        no_states, no_mask = encoder([""])
        # The file's name follows from all that decides its content; the empty caption's states stand for the encoder's
        # weights, and this script for what it does to the pictures.
        key = Hasher.hash((dataset._fingerprint, size, encoder_name, no_states.numpy().tobytes(),
                           Path(__file__).read_bytes()))
        self.rows = dataset.map(self.prepare, batched=True, batch_size=64, fn_kwargs=dict(encoder=encoder),
                                remove_columns=dataset.column_names, new_fingerprint=key,
                                desc="decoding pictures, encoding captions")
        self.length = max(self.rows["length"])                                     # L, the longest caption
        self.no_text = self.pad(no_states[0]), self.pad(no_mask[0])                # (L, D), (L,)

    def prepare(self, batch, encoder):
        """Rows of `image` and `text` -> bytes of the pixels (3, size, size) and of the token states (length, D)."""
        for image, text in zip(batch["image"], batch["text"]):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"picture {image and image['path']}: its caption is {text!r}")
        states, mask = encoder(batch["text"])
        lengths = mask.sum(dim=1).tolist()
        return {"pixels": [decode(image, self.size).tobytes() for image in batch["image"]],
                "states": [row[:length].numpy().tobytes() for row, length in zip(states, lengths)],
                "length": lengths}

    def text_statistics(self, captions=1000):
        """Mean and standard deviation of each number in the token states, over the first captions: (D,), (D,)."""
        states = self.rows.select_columns("states")[:captions]["states"]
        states = torch.frombuffer(bytearray(b"".join(states)), dtype=torch.float32).view(-1, self.dim)  # (tokens, D)
        return states.mean(dim=0), states.std(dim=0).clamp(min=0.01)       # a number that never changes stays small

    def pad(self, tokens):
        """Append zeros to (length, ...) until it is (L, ...)."""
        return torch.cat([tokens, tokens.new_zeros(self.length - len(tokens), *tokens.shape[1:])])

    def batch(self, indices):
        """Row numbers -> x_0 (B, 3, size, size) in [-1, 1], states (B, L, D), mask (B, L)."""
        rows = self.rows[indices]
        pixels = torch.frombuffer(bytearray(b"".join(rows["pixels"])), dtype=torch.uint8)
        states = [torch.frombuffer(bytearray(row), dtype=torch.float32).view(-1, self.dim) for row in rows["states"]]
        mask = torch.arange(self.length) < torch.tensor(rows["length"])[:, None]
        return (pixels.view(-1, 3, self.size, self.size).float() / 127.5 - 1,
                torch.stack([self.pad(row) for row in states]), mask)


def split(count, seed):
    """Row numbers -> (training, validation), shuffled by the seed."""
    order = torch.randperm(count, generator=generator_for(seed, 0)).tolist()
    held_out = max(1, round(count * VALIDATION_SHARE))
    return order[held_out:], order[:held_out]


# ---------------------------------------------------------------------------------------------- loss

def diffusion_loss(unet, scheduler, x_0, states, mask, t, noise):
    """The network's squared error in v at the times t, one number a picture: (B,)."""
    x_t = scheduler.add_noise(x_0, noise, t)                                  # (B, 3, H, W)
    v = unet(x_t, t, states, mask)
    return (v - scheduler.velocity(x_0, noise, t)).square().mean(dim=(1, 2, 3))


def training_batch(pictures, indices, scheduler, generator):
    """What one step learns from (DDPM Algorithm 1, lines 2 to 4), drawn on the CPU: x_0, states, mask, t, noise."""
    x_0, states, mask = pictures.batch(indices)
    B = len(x_0)
    flip = torch.rand(B, generator=generator) < 0.5                           # mirrored, half of them
    x_0 = torch.where(per_picture(flip), x_0.flip(-1), x_0)
    # One time from each B-th of 0 ... T-1, so that every batch sees the whole range (arXiv 2107.00630, I.1)
    u = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    t = (u * scheduler.num_timesteps).long().clamp(max=scheduler.num_timesteps - 1)
    noise = torch.randn(x_0.shape, generator=generator)
    # Without caption dropout, guidance would subtract an answer that was never trained (CFG Algorithm 1)
    drop = torch.rand(B, generator=generator) < CAPTION_DROPOUT
    no_states, no_mask = pictures.no_text
    states = torch.where(drop[:, None, None], no_states, states)
    mask = torch.where(drop[:, None], no_mask, mask)
    return x_0, states, mask, t, noise


@torch.no_grad()
def validate(unet, scheduler, pictures, indices, batch_size, seed):
    """Held-out loss with each picture's own caption, with another picture's and with none: three floats.

    Each picture always has the same noise and time, and the times are spread evenly: the numbers of two epochs, or
    of two captions, can be compared. They tell whether the text is used.
    """
    device, n = scheduler.signal.device, len(indices)
    noise = torch.randn(n, 3, pictures.size, pictures.size, generator=generator_for(seed, 1))
    t = ((torch.arange(n) + 0.5) / n * scheduler.num_timesteps).long()
    x_0, states, mask = pictures.batch(indices)
    captions = [(states, mask), (states.roll(1, 0), mask.roll(1, 0)),
                tuple(part.expand(n, *part.shape).contiguous() for part in pictures.no_text)]
    losses = torch.zeros(len(captions), device=device)
    for i, (states, mask) in enumerate(captions):
        for part in torch.arange(n).split(batch_size):
            batch = [tensor[part].to(device) for tensor in (x_0, states, mask, t, noise)]
            losses[i] += diffusion_loss(unet, scheduler, *batch).sum() / n
    return losses.tolist()


# ---------------------------------------------------------------------------------------------- training

def learning_rate(step, steps, peak):
    """Linear warm-up, then half a cosine down to 0."""
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def update_ema(ema, unet, step):
    """Move the averaged weights towards the current ones; at first fast, so that short runs are not left behind."""
    decay = min(EMA_LIMIT, (1 + step) / (10 + step))
    for average, weight in zip(ema.parameters(), unet.parameters()):
        average.lerp_(weight, 1 - decay)


class StopWish:
    """Turns Ctrl-C and SIGTERM into a wish that the training loop grants after the step it is in."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        """What Python calls when the signal arrives; frame, where it was, does not matter."""
        self.signal = number

    def granted(self, run):
        """The signal that was sent, or 0. Several processes agree on it: all have to stop after the same step."""
        if run.processes > 1:
            sent = torch.tensor(self.signal, device=run.scheduler.signal.device)
            distributed.all_reduce(sent, distributed.ReduceOp.MAX)
            self.signal = sent.item()
        return self.signal


@dataclass
class Run:
    """What the functions below share."""
    args: argparse.Namespace
    pictures: Pictures
    prompts_text: tuple               # (states, mask) of the --prompts and, last, of the empty caption
    scheduler: NoiseScheduler
    unet: UNet
    model: nn.Module                  # the unet, or under torchrun what averages its gradients over the processes
    ema: UNet                         # a copy that holds the averaged weights: what validation and samples show
    optimizer: torch.optim.Optimizer
    amp: object                       # the context that the forward pass runs under
    state: dict                       # step, epoch ...: the plain values of the checkpoint
    rank: int                         # this process's number under torchrun, else 0: the one that writes
    processes: int                    # how many there are


def train_step(run, indices, lr):
    """One step of DDPM Algorithm 1 -> the loss, still on the device; not finite if the gradients were not.

    Each of several processes draws the whole batch, the same in all of them, and learns from its share of it.
    """
    step, device = run.state["step"], run.scheduler.signal.device
    batch = training_batch(run.pictures, indices, run.scheduler, generator_for(run.args.seed, 3, step))
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    share = [part[run.rank::run.processes].to(device) for part in batch]  # all of it where there is one process
    with run.amp:
        loss = diffusion_loss(run.model, run.scheduler, *share).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.unet.parameters(), CLIP_NORM)
    run.optimizer.step()
    run.optimizer.zero_grad()
    update_ema(run.ema, run.unet, step)
    run.state["step"] += 1
    loss = loss.detach() + 0 * norm  # 0 * inf is not a number, so that one check later finds either
    if run.processes > 1:
        distributed.all_reduce(loss)
    return loss / run.processes


def to_cpu(tree):
    """The same nested dicts and lists with every tensor on the CPU."""
    if isinstance(tree, dict):
        return {key: to_cpu(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [to_cpu(value) for value in tree]
    return tree.cpu() if isinstance(tree, torch.Tensor) else tree


def check_finite(run, path):
    """Exit with one line if the epoch's losses so far are not finite, before anything is saved."""
    if not math.isfinite(run.state["loss_sum"]):
        last = f"the last good checkpoint is {path}" if path.is_file() else "no checkpoint was written yet"
        sys.exit(f"error: the loss is not finite at step {run.state['step']}; {last}. Try a lower --lr")


def save(run, path):
    """Write the checkpoint: the run's state, the network, its average and the optimizer, all tensors on the CPU."""
    check_finite(run, path)
    checkpoint = dict(run.state, loss_sum=float(run.state["loss_sum"]), model=to_cpu(dict(run.unet.state_dict())),
                      ema=to_cpu(dict(run.ema.state_dict())), optimizer=to_cpu(run.optimizer.state_dict()))
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def resume(run, path):
    """Take up what `save` wrote; exits with one line where that run had other flags."""
    checkpoint = load_checkpoint(path)
    with fits(path):
        differ = [f"--{name.replace('_', '-')} is {value}, was {checkpoint['flags'][name]}"
                  for name, value in run.state["flags"].items() if checkpoint["flags"][name] != value]
    if differ:
        sys.exit(f"error: --resume: {path} was trained with other flags: {'; '.join(differ)}")
    with fits(path):
        run.unet.load_state_dict(checkpoint["model"])
        run.ema.load_state_dict(checkpoint["ema"])
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        run.state = {name: checkpoint[name] for name in run.state}


def read_log(path, epochs):
    """The rows of log.csv up to the checkpoint's epoch, so that after a resume each epoch stands there once."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["epoch"]) <= epochs]


def write_log(path, rows):
    """Write log.csv, a row an epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, LOG_COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def draw_loss_curve(path, rows):
    """Write loss.png: training loss, held-out losses and the learning rate. Skipped where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("train_loss", "val_loss", "val_loss_shuffled", "val_loss_empty"):
        axes.plot(epochs, [float(row[name]) for row in rows], label=name.replace("_", " "))
    axes.set(xlabel="epoch", ylabel="loss", yscale="log")
    axes.legend()
    right = axes.twinx()
    right.plot(epochs, [float(row["lr"]) for row in rows], color="lightgrey")
    right.set_ylabel("learning rate (grey)")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def draw_samples(run, path):
    """Write a sheet with a labelled row for each prompt; the noise is the same in every row and every epoch."""
    prompts, (states, mask) = run.args.prompts, run.prompts_text
    of_row = torch.arange(len(prompts)).repeat_interleave(SAMPLES)                       # (prompts * SAMPLES,)
    seeds = [(run.args.seed, i) for _ in prompts for i in range(SAMPLES)]
    with run.amp:
        pictures = draw(run.ema, run.scheduler, (states[of_row], mask[of_row]), (states[-1:], mask[-1:]), seeds)
    save_picture(contact_sheet(list(zip(prompts, pictures.split(SAMPLES)))), path)


def torchrun():
    """This process's number and how many there are: (0, 1) unless torchrun started several."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def prepare_data(args):
    """Arguments -> Pictures, and the states of the prompts and of the empty caption, last. CLIP is then let go."""
    use_cache_if_unreachable(args.text_encoder, args.dataset)
    encoder = load_encoder(args.text_encoder)
    dataset = read_dataset(args)
    try:
        pictures = Pictures(dataset, args.image_size, encoder, args.text_encoder)
    except ValueError as error:
        sys.exit(f"error: --dataset {args.dataset}: {first_line(error)}")
    if len(pictures.rows) < args.batch_size + 1:
        sys.exit(f"error: --batch-size {args.batch_size}: {args.dataset} has only {len(pictures.rows)} pictures")
    return pictures, encoder([*args.prompts, ""])


def start(args, device, pictures, prompts_text):
    """Arguments and data -> Run, at its first step."""
    torch.manual_seed(args.seed)                                          # the weights' first values
    config = UNetConfig(image_size=args.image_size, channels=args.channels, context_dim=pictures.dim)
    unet = UNet(config)
    unet.text_mean, unet.text_std = pictures.text_statistics()
    unet.to(device)
    rank, processes = torchrun()
    model = DistributedDataParallel(unet) if processes > 1 else unet
    ema = deepcopy(unet).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, fused=True)
    scheduler = NoiseScheduler().to(device)
    state = dict(format=FORMAT, config=asdict(config), num_timesteps=scheduler.num_timesteps, step=0, epoch=0,
                 loss_sum=0.0, seconds=0.0, flags={name: getattr(args, name) for name in MUST_MATCH})
    return Run(args, pictures, prompts_text, scheduler, unet, model, ema, optimizer, autocast(device, args.precision),
               state, rank, processes)


def train_epoch(run, training, steps, bar, wish):
    """The steps of an epoch that are still to be done; returns early, after a whole step, where a stop is wished."""
    state, size = run.state, run.args.batch_size
    per_epoch = len(training) // size                                     # what is left over waits for a later epoch
    order = torch.randperm(len(training), generator=generator_for(run.args.seed, 2, state["epoch"])).tolist()
    for i in range(state["step"] - state["epoch"] * per_epoch, per_epoch):
        started, lr = time.perf_counter(), learning_rate(state["step"], steps, run.args.lr)
        loss = train_step(run, [training[j] for j in order[i * size:(i + 1) * size]], lr)
        state["loss_sum"] += loss
        if state["step"] % READ_EVERY == 0 or i == per_epoch - 1:
            check_finite(run, run.args.output_dir / "checkpoint.pt")
            bar.set_postfix(epoch=state["epoch"] + 1, loss=f"{loss.item():.4f}", lr=f"{lr:.1e}", refresh=False)
        state["seconds"] += time.perf_counter() - started
        bar.update(size)
        if wish.granted(run):
            return


def finish_epoch(run, validation, steps_per_epoch, lr, rows):
    """Validate, and close the epoch with a row for log.csv."""
    state = run.state
    with run.amp:
        val_loss, shuffled, empty = validate(run.ema, run.scheduler, run.pictures, validation, run.args.batch_size,
                                             run.args.seed)
    state["epoch"] += 1
    rows.append(dict(epoch=state["epoch"], step=state["step"], lr=f"{lr:.3e}", seconds=f"{state['seconds']:.1f}",
                     train_loss=f"{float(state['loss_sum']) / steps_per_epoch:.5f}", val_loss=f"{val_loss:.5f}",
                     val_loss_shuffled=f"{shuffled:.5f}", val_loss_empty=f"{empty:.5f}"))
    state["loss_sum"] = 0.0


def write_epoch(run, out, rows):
    """Write what belongs to the epoch that has just ended: the log, and now and then samples and a checkpoint."""
    write_log(out / "log.csv", rows)
    epoch, last = run.state["epoch"], run.state["epoch"] == run.args.epochs
    if epoch % run.args.sample_every == 0 or last:
        draw_samples(run, out / "samples" / f"epoch_{epoch:04d}.png")
        draw_loss_curve(out / "loss.png", rows)
    if epoch % run.args.save_every == 0 or last:
        save(run, out / "checkpoint.pt")


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    out, checkpoint = args.output_dir, args.output_dir / "checkpoint.pt"
    if checkpoint.exists() and not args.resume:
        sys.exit(f"error: {checkpoint} is there already: go on from it with --resume, or give another --output-dir")
    check_writable("--output-dir", out)
    rank, processes = torchrun()
    if args.batch_size % processes:
        sys.exit(f"error: --batch-size {args.batch_size} can't be shared by {processes} processes")
    if processes > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    pictures, prompts_text = prepare_data(args)
    run = start(args, device, pictures, prompts_text)
    if args.resume:
        resume(run, checkpoint)
    training, validation = split(len(pictures.rows), args.seed)
    steps_per_epoch = len(training) // args.batch_size
    steps = args.epochs * steps_per_epoch
    rows = read_log(out / "log.csv", run.state["epoch"])
    if rank == 0:
        print(f"{len(training)} pictures to train on, {len(validation)} held out; "
              f"{sum(p.numel() for p in run.unet.parameters()) / 1e6:.1f} M parameters on {device}; writing to {out}")

    wish = StopWish()
    done = run.state["step"] * args.batch_size
    with tqdm(total=steps * args.batch_size, initial=done, unit=" pictures", disable=rank > 0) as bar:
        while run.state["epoch"] < args.epochs:
            train_epoch(run, training, steps, bar, wish)
            if wish.signal:
                break
            lr = learning_rate(run.state["step"] - 1, steps, args.lr)
            finish_epoch(run, validation[:VALIDATION_MOST], steps_per_epoch, lr, rows)
            if rank == 0:
                write_epoch(run, out, rows)
    if rank == 0 and wish.signal:
        save(run, checkpoint)
        print(f"stopped after step {run.state['step']}; the same command with --resume goes on from {checkpoint}")
    if processes > 1:
        distributed.destroy_process_group()
    if wish.signal:
        sys.exit(128 + wish.signal)
    if rank == 0:
        print(f"done: {checkpoint}")


if __name__ == "__main__":
    main()
