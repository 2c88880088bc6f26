"""Train a text-to-image diffusion model from scratch on captioned pictures.

    python train_diffusion.py                          # the pokemon drawings of the Hugging Face Hub, at 64x64
    python train_diffusion.py --demo                   # the drawings in examples/: no download, a few minutes
    python train_diffusion.py --dataset my_pictures    # a folder of pictures and captions
    python train_diffusion.py --resume                 # go on where the last run stopped
    torchrun --nproc-per-node=2 train_diffusion.py     # on two GPUs; --batch-size stays the size of the whole batch

It writes to --output-dir: checkpoint.pt, log.csv (a row per epoch), loss.png and samples/epoch_0010.png ...
"""
import csv
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
import unicodedata
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import Counter
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from model import (GROUPS, STRIDE, NoiseScheduler, TextEncoder, UNet, UserError, ask_hub, autocast, check_writable,
                   first_line, first_tokens, generator_for, number, pick_device, prompt, run, user_errors,
                   write_atomically)
from sample_diffusion import FORMAT, contact_sheet, draw, load_checkpoint

EXAMPLES = Path(__file__).resolve().parent / "examples"
DEMO = dict(dataset=str(EXAMPLES / "creatures"), text_encoder=str(EXAMPLES / "tiny_clip"),  # what --demo sets:
            image_size=32, channels=32, epochs=36, sample_every=18, caption_cut=0,          # 4 minutes on two CPU cores
            prompts=["a red creature with a blue tail", "a green creature with yellow wings"])

CAPTION_COLUMNS = ("en_text", "text", "caption")  # looked for in this order; en_text is the pokemon drawings'
CAPTION_DROPOUT = 0.1    # share of training examples whose caption is dropped: 'no caption' is learned too (CFG)
L1_WEIGHT = 5            # weight of the absolute error at the clean end of the noise levels
VALIDATION_SHARE = 0.1   # of the pictures are never trained on ...
MAX_VALIDATION = 32      # ... and at most so many of them are looked at after each epoch
WARMUP_STEPS = 50        # the learning rate rises over these, then falls on a cosine
ADAMW_SHARE = 0.3        # of --lr is the learning rate of what AdamW learns
WEIGHT_DECAY = 0.01      # of Muon and AdamW
MOMENTUM = 0.95          # of Muon
ITERATIONS = 5           # of Newton-Schulz in Muon: two draw clearly worse
EMA_DECAY = 0.999        # EMA of the weights: over the last 1 / (1 - 0.999) = 1,000 steps; the decay warms up
GUIDE_STEPS = 1_350      # guidance leads away from the average after these: 30 pokemon epochs; 10 and 60 drew worse
CLIP_NORM = 1.0          # gradients longer than this are shortened to it
SAMPLES = 6              # pictures of each prompt on a sample sheet
READ_EVERY = 10          # steps between readings of the loss: each waits for the device
MUST_MATCH = ("image_size", "channels", "batch_size", "lr", "caption_cut", "seed")  # on --resume, beside the data


# ---------------------------------------------------------------------------------------------- arguments

def parse_args(argv=None):
    """Command line -> namespace; argparse itself names a wrong flag and exits with 2."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add, count = parser.add_argument, number(int, 1, 10 ** 9)
    add("--dataset", default="svjack/pokemon-blip-captions-en-zh",
        help="hub name or folder: metadata.jsonl or .csv (file_name, text), parquet files, or a .txt for each picture")
    add("--image-column", default="image", help="column that holds the pictures")
    add("--caption-column", help="column that holds the captions; if not given, " + " or ".join(CAPTION_COLUMNS))
    add("--text-encoder", default="openai/clip-vit-base-patch32", help="hub name or folder of a CLIP text encoder")
    add("--demo", action="store_true", help="train a small model on the drawings in examples/, without a network")
    add("--image-size", type=number(int, STRIDE, 256, STRIDE), default=64, help=f"pixels a side, in steps of {STRIDE}")
    add("--channels", type=number(int, GROUPS, 1024, GROUPS), default=64, help=f"UNet's width, in steps of {GROUPS}")
    add("--epochs", type=count, default=320, help="passes over the pictures, in all; it can be raised on --resume")
    add("--batch-size", type=count, default=16, help="pictures per step")
    add("--lr", type=number(float, 1e-9, 1), default=0.015, help="highest learning rate of Muon")
    add("--caption-cut", type=number(float, 0, 1), default=0.5,
        help="share of captions that end after a random token in training: their words then stand for many pictures")
    add("--prompts", type=prompt, nargs="+", default=["a water type pokemon", "a dragon character with tail"],
        help="what the sample sheets show")
    add("--sample-every", type=count, default=10, help="epochs between sample sheets")
    add("--save-every", type=count, default=10, help="epochs between checkpoints")
    add("--output-dir", type=Path, help="where all is written; if not given, output/ and the data set's name")
    add("--resume", action="store_true", help="go on from the checkpoint in --output-dir")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of the weights, the held-out pictures, all noise")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu), cuda, mps or cpu")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="of training; auto: bf16 if CUDA or the CPU has it")
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or Path("output", "demo" if args.demo else Path(args.dataset).resolve().name)
    return args


# ---------------------------------------------------------------------------------------------- data

def read_rows(args):
    """--dataset -> [(name, picture as a path or the bytes of a file, caption)], in order. Raises UserError."""
    path = Path(args.dataset)
    if not path.exists() or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return list(table_rows(path, {}, args))                           # on the hub, or made by save_to_disk
    by_name = {same_name(file): file for file in (walk(path, args.output_dir) if path.is_dir() else [path])}
    files = by_name.values()
    metadata = {file.parent: file for file in files if file.name in ("metadata.csv", "metadata.jsonl")}  # one a folder
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    tables = [file for file in tables if file.name.startswith("train-")] or tables
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures = {file: same_name(file.with_suffix("")) for file in files if file.suffix.lower() in readable}
    texts = {same_name(file.with_suffix("")): file for file in files if file.suffix.lower() == ".txt"}
    if metadata or not texts.keys().isdisjoint(pictures.values()):        # then a .parquet holds something else
        tables = metadata.values()
    rows = ([row for table in tables for row in table_rows(table, by_name, args)] if tables else
            list(text_rows(files, pictures, texts)))
    if not rows:
        raise UserError(f"--dataset {path}: no metadata.jsonl or metadata.csv, no .parquet file and no picture in it")
    return rows


def walk(folder, output):
    """Every file below a folder, in order, through links; not what is hidden, or left by a system or our scripts."""
    seen = {os.path.realpath(output), os.path.realpath("output")} - {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        if (here := os.path.realpath(root)) in seen:                      # by a link: each folder counts once
            folders[:] = names[:] = []
        seen.add(here)
        folders[:] = sorted((name for name in folders if not name.startswith(".")
                             and name not in ("__MACOSX", "@eaDir")), key=same_name)  # of a Mac's zip, of a NAS
        yield from (Path(root, name) for name in sorted(names, key=same_name) if not name.startswith("."))


def same_name(path):
    """A path as text in which accents are always composed alike (zip files made on a Mac take them apart)."""
    return unicodedata.normalize("NFC", os.fsencode(os.path.normpath(path)).decode("utf-8", "replace"))


def text_rows(files, pictures, texts):
    """Pictures, each with a .txt of the same name -> rows. Raises UserError for one without."""
    # A captioned file that Pillow does not know (.heic) is a picture too: `decode` will name it
    alone = texts.keys() - set(pictures.values())
    for file in files:
        name = same_name(file.with_suffix(""))
        if file in pictures and name not in texts:
            raise UserError(f"{file} has no caption: expected {file.with_suffix('.txt').name} beside it, or a "
                            "metadata.jsonl or metadata.csv with the columns file_name and text")
        if file in pictures or name in alone and file != texts[name]:
            yield str(file), file, read(texts[name])


def table_rows(source, by_name, args):
    """A table -> rows. Its pictures are paths, bytes, or a struct of both. Raises UserError for a missing column."""
    is_metadata = source.suffix in (".csv", ".jsonl")
    flag, column = ("--dataset", "file_name") if is_metadata else ("--image-column", args.image_column)
    captions = [args.caption_column] if args.caption_column else CAPTION_COLUMNS
    for i, row in enumerate(read(source)):
        if None in row:                                                   # csv's name for cells beyond the header
            raise UserError(f"{source}: more cells than columns (a comma without quotes?): {row!r:.99}")
        for found_by, names in (flag, [column]), ("--caption-column", captions):
            if row.keys().isdisjoint(names):
                raise UserError(f"{found_by}: {source} has no {' or '.join(map(repr, names))}, only {', '.join(row)}")
        picture, name = row[column], f"in row {i}, column {column!r} of {source}"
        if isinstance(picture, dict):
            picture = picture.get("bytes") or picture.get("path")
        if isinstance(picture, str):
            name = f"{picture} {name}"
            picture = by_name.get(same_name(source.parent / picture), source.parent / picture)
        yield name, picture, next(row[caption] for caption in captions if caption in row)


def read(source):
    """A .txt file -> its text; a .csv or .jsonl, or what `dataset_rows` takes -> a list of dicts. Raises UserError."""
    with user_errors(f"--dataset: {source}", source):
        if source.suffix.lower() not in (".txt", ".csv", ".jsonl"):
            return list(dataset_rows(source))
        text = source.read_bytes().decode("utf-8-sig")                    # with a byte order mark or without
        if source.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        if source.suffix == ".jsonl":
            return [dict(json.loads(line)) for line in text.split("\n") if line.strip()]
        return text


def dataset_rows(source):
    """A .parquet file, a folder of save_to_disk or a name on the hub -> dicts: pictures as stored, labels as names."""
    import datasets  # seconds to import: only for what needs it
    import pyarrow.parquet
    if source.is_file():
        table = datasets.Dataset(datasets.table.InMemoryTable(pyarrow.parquet.read_table(source)))
    else:
        table = datasets.load_from_disk(source) if source.is_dir() else datasets.load_dataset(source.as_posix())
    if isinstance(table, dict):                                           # of splits
        if "train" not in table and len(table) > 1:
            raise UserError(f"--dataset {source}: no split 'train', only {', '.join(table)}")
        table = table.get("train", next(iter(table.values())))
    labels = {name: dict(enumerate(feature.names)) for name, feature in table.features.items()
              if hasattr(feature, "names")}
    for part in table.with_format("arrow").iter(100):
        for row in part.to_pylist():
            yield row | {name: names.get(row[name]) for name, names in labels.items()}


def decode(name, picture, size):
    """A path or the bytes of a picture file -> uint8 RGB (3, size, size), its centre square. Raises UserError."""
    from torchvision.transforms.v2.functional import pil_to_tensor
    with user_errors(f"picture {name} can't be read"):
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            picture = ImageOps.exif_transpose(opened)                     # upright
        if picture.mode.startswith("I"):                                  # 16 bits of grey, which PIL would clip at 255
            picture = picture.convert("I").point(lambda grey: grey / 257 + 0.5).convert("L")
        if picture.has_transparency_data:                                 # white behind it
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return pil_to_tensor(ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.BILINEAR))


class Pictures:
    """Captioned pictures in memory, decoded, resized and encoded once.

    pixels (N, 3, S, S) uint8; states (N + 1, L, D) and mask (N + 1, L) of the captions, the empty one last;
    fingerprint: the same for the same pixels and captions, wherever they lie.
    """

    def __init__(self, rows, size, encoder):
        captions = []
        for name, _, caption in rows:
            if isinstance(caption, (list, dict)) or caption is None or not str(caption).strip():
                raise UserError(f"picture {name}: its caption is {caption!r:.60}")
            captions.append(str(caption).strip().encode("utf-8", "replace").decode())
        self.pixels = torch.stack([decode(name, picture, size) for name, picture, _ in
                                   tqdm(rows, desc="reading pictures", leave=False)])
        states = []                                                       # of each caption (length, D)
        for some in tqdm(range(0, len(rows) + 1, 64), desc="encoding captions", leave=False):
            states += [row[real] for row, real in zip(*encoder([*captions, ""][some:some + 64]))]
        self.states = pad_sequence(states, batch_first=True)
        self.mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in states], batch_first=True)
        self.hashes = [hashlib.sha256(picture.numpy()).hexdigest() for picture in self.pixels]
        self.fingerprint = hashlib.sha256(json.dumps([self.hashes, captions]).encode()).hexdigest()

    def split(self, seed):
        """Row numbers -> (training, held out), shuffled by the seed. All rows of one picture are on the same side."""
        order = torch.randperm(len(self.pixels), generator=generator_for(seed, "split")).tolist()
        rows_of, held_out = Counter(self.hashes[i] for i in order), set()  # hash: number of rows, in that order
        room = max(min(rows_of.values()), round(len(order) * VALIDATION_SHARE))
        for digest, rows in rows_of.items():
            if rows <= room:
                held_out.add(digest)
                room -= rows
        return ([i for i in order if self.hashes[i] not in held_out], [i for i in order if self.hashes[i] in held_out])

    def batch(self, indices, captions):
        """Row numbers of pictures and of captions -> x_0 (B, 3, S, S) in [-1, 1], states (B, L, D), mask (B, L)."""
        return self.pixels[indices].float() / 127.5 - 1, self.states[captions], self.mask[captions]


# ---------------------------------------------------------------------------------------------- loss

def training_batch(pictures, indices, scheduler, caption_cut, generator):
    """What one step learns from (DDPM Algorithm 1, lines 2 to 4), drawn on the CPU: x_0, states, mask, t, noise."""
    indices = torch.tensor(indices)
    B = len(indices)
    # Without caption dropout, guidance would subtract an answer that was never trained (CFG Algorithm 1)
    dropped = torch.rand(B, generator=generator) < CAPTION_DROPOUT
    x_0, states, mask = pictures.batch(indices, torch.where(dropped, len(pictures.pixels), indices))
    # Trained on whole captions alone, each comes to stand for its one picture, and a new sentence of their words for
    # none. CLIP reads from left to right: these are the states of a shorter caption, but for its end token
    u = torch.rand(B, 1, generator=generator)
    mask = first_tokens(mask, torch.where(u < caption_cut, u / caption_cut, 1))  # (B, L)
    flip = torch.rand(B, 1, 1, 1, generator=generator) < 0.5                  # mirrored, half of them
    x_0 = torch.where(flip, x_0.flip(-1), x_0)
    # Stratified: one time from each B-th of 0 ... T-1, so that every batch sees all noise levels
    u = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    t = (u * scheduler.num_timesteps).long().clamp(max=scheduler.num_timesteps - 1)
    return x_0, states, mask, t, torch.randn(x_0.shape, generator=generator)


def diffusion_loss(unet, scheduler, x_0, states, mask, t, noise):
    """How far the network's clean picture is from x_0 at the times t, one number per picture: (B,).

    Deep in the noise the squared error, whose best answer is the mean of all pictures that fit; the cleaner x_t
    is, the more the absolute error, whose best answer is the median: white paper, flat colours, sharp outlines.
    """
    x_t = scheduler.add_noise(x_0, noise, t)                                    # (B, 3, H, W)
    error = unet(x_t, t, states, mask) - x_0                                    # (B, 3, H, W)
    alpha_bar = scheduler.signal_scale[t].square()                              # (B, 1, 1, 1)
    return (error.square() + L1_WEIGHT * alpha_bar * error.abs()).mean(dim=(1, 2, 3))


@torch.no_grad()
def validate(unet, scheduler, pictures, indices, batch_size, seed):
    """Held-out loss with each picture's own caption, with another picture's and with none: three floats.

    Each picture always has the same noise and time, and the times are spread evenly: the numbers of two epochs, or
    of two captions, can be compared. They tell whether the text is used.
    """
    device, indices, n = scheduler.signal_scale.device, torch.tensor(indices), len(indices)
    t = ((torch.arange(n) + 0.5) / n * scheduler.num_timesteps).long()
    noise = torch.randn(n, *pictures.pixels.shape[1:], generator=generator_for(seed, "validation"))
    captions = torch.cat([indices, indices.roll(1), torch.full_like(indices, len(pictures.pixels))])
    batch = (*pictures.batch(indices.repeat(3), captions), t.repeat(3), noise.repeat(3, 1, 1, 1))
    losses = [diffusion_loss(unet, scheduler, *(tensor.to(device) for tensor in part))
              for part in zip(*(tensor.split(batch_size) for tensor in batch))]
    return torch.cat(losses).view(3, n).mean(dim=1).tolist()


def orthogonal(matrices):
    """(K, m, n) -> the same singular vectors, with all singular values near 1: Newton-Schulz iterations (Muon).

    Each multiplies x by 3.4445 I - 4.7750 (x x^T) + 2.0315 (x x^T)^2. The loop follows only the small x x^T and the
    product of these factors; x is multiplied once, at the end.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    eye = torch.eye(x.shape[1], device=x.device)
    gram, product = x @ x.mT, eye                                        # (K, m, m) and, at first, (m, m)
    for _ in range(ITERATIONS):
        factor = 3.4445 * eye + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, with each update made orthogonal, so that all directions of a weight matrix learn equally fast.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon. A convolution's weight (O, I, 3, 3) is taken as (O, 9 I).
    All matrices of one size are moved together: a GPU takes as long for one small product as for twenty.
    """

    def __init__(self, weights, lr):
        sizes = {}
        for weight in weights:
            sizes.setdefault(weight.flatten(1).shape, []).append(weight)
        super().__init__([dict(params=alike) for alike in sizes.values()], dict(lr=lr))

    @torch.no_grad()
    def step(self):
        """Move every weight by one update, a tall matrix further; the decay is AdamW's."""
        for group in self.param_groups:
            weights, lr = group["params"], group["lr"]
            gradient = torch.stack([weight.grad.flatten(1) for weight in weights])             # (K, m, n)
            state = self.state[weights[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            state["momentum"].lerp_(gradient, 1 - MOMENTUM)
            update = orthogonal(gradient.lerp(state["momentum"], MOMENTUM))                    # Nesterov's look ahead
            length = lr * max(1, update.shape[1] / update.shape[2]) ** 0.5
            for weight, change in zip(weights, update):
                weight.mul_(1 - lr * WEIGHT_DECAY).sub_(change.view_as(weight), alpha=length)


def optimizers_for(unet, lr):
    """Muon for the matrices, AdamW for gains and biases, and for the time's layers, where Muon would cost too much."""
    matrices, rest = [], []
    for name, weight in unet.named_parameters():
        (matrices if weight.ndim > 1 and "time" not in name else rest).append(weight)
    return Muon(matrices, lr), torch.optim.AdamW(rest, ADAMW_SHARE * lr, weight_decay=WEIGHT_DECAY, fused=True)


def learning_rate(step, steps, peak):
    """Linear warm-up, then half a cosine down to 0."""
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
    return peak * min((step + 1) / warmup, cosine)


@torch.no_grad()
def update_ema(ema, unet, step):
    """Move the averaged weights towards the current ones; at first fast, so that short runs are not left behind."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    for average, weight in zip(ema.parameters(), unet.parameters()):
        average.lerp_(weight, 1 - decay)


# ---------------------------------------------------------------------------------------------- stopping, saving

class StopRequest:
    """Ctrl-C, SIGTERM and a closed terminal ask the loop to stop after its step; a second Ctrl-C ends at once."""

    def __enter__(self):
        self.signal, self.before = 0, {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)                           # Windows has no SIGHUP
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it
                with suppress(ValueError):                                 # in a thread, Python allows no handlers
                    self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        """What Python calls when the signal arrives."""
        self.signal = number
        signal.signal(number, self.before[number])

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, device, processes):
        """The signal that was sent to any of the processes, or 0: all have to stop after the same step."""
        if processes == 1:
            return self.signal
        sent = torch.tensor(self.signal, device=device)      # a signal that comes from here on counts in the next step
        distributed.all_reduce(sent, distributed.ReduceOp.MAX)
        return sent.item()


def by_product(path, save):
    """Write what save(file) writes. What fails costs a warning, not the run: a full disk, no matplotlib."""
    try:
        write_atomically(path, save)
    except Exception as error:
        tqdm.write(f"warning: {path} was not written: {first_line(error)}")


def loss_curve(rows):
    """matplotlib's figure of the log: training loss, held-out losses and the learning rate."""
    from matplotlib.figure import Figure
    figure, epochs = Figure(figsize=(7, 4), dpi=110, layout="constrained"), [row["epoch"] for row in rows]
    axes = figure.subplots()
    for name in ("train_loss", "val_loss", "val_loss_shuffled", "val_loss_empty"):
        axes.plot(epochs, [float(row[name]) for row in rows], label=name.replace("_", " "))
    axes.set(xlabel="epoch", ylabel="loss", yscale="log")
    axes.legend()
    right = axes.twinx()
    right.plot(epochs, [float(row["lr"]) for row in rows], color="lightgrey")
    right.set_ylabel("learning rate (grey)")
    return figure


# ---------------------------------------------------------------------------------------------- main

def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    out, path, amp = args.output_dir, args.output_dir / "checkpoint.pt", autocast(device, args.precision)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
    if path.exists() != args.resume:
        raise UserError(f"{path} is there already: go on from it with --resume, or give another --output-dir"
                        if path.exists() else f"--resume: there is no {path}")
    check_writable("--output-dir", out)
    if args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size} can't be shared by {processes} processes")
    if processes > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # Data: pictures and captions, once; then CLIP is let go
    ask_hub(args.text_encoder, args.dataset)
    encoder = TextEncoder(args.text_encoder)
    pictures = Pictures(read_rows(args), args.image_size, encoder)
    text = encoder([*args.prompts, ""])                            # of the sample sheets
    del encoder
    training, held_out = pictures.split(args.seed)
    steps_per_epoch = len(training) // args.batch_size            # what is left over waits for a later epoch
    if not steps_per_epoch:
        raise UserError(f"--batch-size {args.batch_size}: {args.dataset} has only {len(training)} pictures to train on")

    # Network, its average, optimizers
    torch.manual_seed(args.seed)                                  # the weights' first values
    unet = UNet(args.image_size, args.channels, pictures.states.shape[-1])
    tokens = pictures.states[training][pictures.mask[training]]   # (tokens, D)
    unet.text_mean, unet.text_std = tokens.mean(dim=0), tokens.std(dim=0).clamp(min=0.01)
    unet.to(device)
    ema = deepcopy(unet).eval().requires_grad_(False)             # what validation and samples show
    guide = deepcopy(ema)                                         # the average as it was early in the run
    model = DistributedDataParallel(unet) if processes > 1 else unet
    optimizers = optimizers_for(unet, args.lr)
    scheduler = NoiseScheduler().to(device)

    # Where the run stands
    step, loss_sum, seconds, log = 0, 0.0, 0.0, []                # the epoch's losses so far; a row per finished epoch
    flags = {name: getattr(args, name) for name in (*MUST_MATCH, "text_encoder")}
    if args.resume:
        checkpoint = load_checkpoint(path)
        with user_errors(f"checkpoint {path} does not fit this version of model.py"):
            differ = [f"--{name.replace('_', '-')} is {flags[name]}, was {checkpoint['flags'][name]}"
                      for name in MUST_MATCH if checkpoint["flags"][name] != flags[name]]
            if checkpoint["fingerprint"] != pictures.fingerprint:
                differ.append("the pictures or captions are not those of the run: they were changed")
            elif not torch.allclose(checkpoint["model"]["text_mean"], unet.text_mean.cpu(), atol=1e-2):
                differ.append("--text-encoder is another one")
            if differ:
                raise UserError(f"--resume: {path} was trained otherwise: {'; '.join(differ)}")
            for name, network in dict(model=unet, ema=ema, guide=guide).items():
                network.load_state_dict(checkpoint[name])
            for optimizer, saved in zip(optimizers, checkpoint["optimizers"]):
                optimizer.load_state_dict(saved)
            step, loss_sum, seconds, log = (checkpoint[name] for name in ("step", "loss_sum", "seconds", "log"))

    steps, stopped = args.epochs * steps_per_epoch, 0
    if rank == 0:
        print(f"{len(training)} pictures to train on, {len(held_out)} held out; "
              f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters on {device}; writing to {out}")
        if args.resume:
            print(f"going on after step {step} of {steps}; the next epoch writes log.csv anew")
    with StopRequest() as stop, tqdm(total=steps, initial=step, unit=" steps", disable=rank > 0) as bar:
        while step < steps and not stopped:
            started, lr = time.perf_counter(), learning_rate(step, steps, args.lr)
            # The epoch's order follows from the seed and the number of epochs done alone: also after --resume
            order = torch.randperm(len(training), generator=generator_for(args.seed, "order", len(log)))
            first = step % steps_per_epoch * args.batch_size
            indices = [training[i] for i in order[first:first + args.batch_size].tolist()]

            # DDPM Algorithm 1. Each of several processes draws the same batch, and learns from its share of it.
            batch = training_batch(pictures, indices, scheduler, args.caption_cut,
                                   generator_for(args.seed, "step", step))
            share = [part[rank::processes].to(device) for part in batch]
            with amp:
                loss = diffusion_loss(model, scheduler, *share).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), CLIP_NORM)
            for optimizer, ratio in zip(optimizers, (1, ADAMW_SHARE)):
                for group in optimizer.param_groups:
                    group["lr"] = ratio * lr
                optimizer.step()
                optimizer.zero_grad()
            update_ema(ema, unet, step)
            if step < GUIDE_STEPS:
                guide.load_state_dict(ema.state_dict())

            loss = (loss.detach() + 0 * norm) / processes         # 0 * inf is not a number: one check finds either
            if processes > 1:
                distributed.all_reduce(loss)
            loss_sum += loss
            step += 1
            stopped, epoch_ends = stop.agreed(device, processes), step % steps_per_epoch == 0
            if stopped or epoch_ends or (step - 1) % READ_EVERY == 0:  # so always before a save
                if not math.isfinite(loss_sum):
                    good = f"the last good checkpoint is {path}" if path.is_file() else "no checkpoint was written yet"
                    raise UserError(f"the loss is not finite at step {step}; {good}. Try a lower --lr")
                bar.set_postfix(epoch=len(log) + 1, loss=f"{loss.item():.4f}", lr=f"{lr:.1e}", refresh=False)
            seconds += time.perf_counter() - started
            bar.update()

            # The epoch's end: validation and a row for log.csv; now and then a checkpoint and pictures
            if epoch_ends:
                with amp:
                    right, shuffled, empty = validate(ema, scheduler, pictures, held_out[:MAX_VALIDATION],
                                                      args.batch_size, args.seed)
                log.append(dict(epoch=len(log) + 1, step=step, lr=f"{lr:.3e}", seconds=f"{seconds:.1f}",
                                train_loss=f"{float(loss_sum) / steps_per_epoch:.5f}", val_loss=f"{right:.5f}",
                                val_loss_shuffled=f"{shuffled:.5f}", val_loss_empty=f"{empty:.5f}"))
                loss_sum = 0.0
            if rank == 0 and (stopped or epoch_ends and (len(log) % args.save_every == 0 or step == steps)):
                write_atomically(path, lambda file: torch.save(tree_map_only(torch.Tensor, torch.Tensor.cpu, dict(
                    format=FORMAT, config=unet.config, num_timesteps=scheduler.num_timesteps, flags=flags,
                    dataset=args.dataset, fingerprint=pictures.fingerprint, step=step, epoch=len(log),
                    loss_sum=float(loss_sum), seconds=seconds, log=log, model=unet.state_dict(), ema=ema.state_dict(),
                    guide=guide.state_dict(), optimizers=[optimizer.state_dict() for optimizer in optimizers])), file))
            if rank == 0 and epoch_ends:
                lines = [",".join(map(str, line)) + "\n" for line in (log[0].keys(), *(row.values() for row in log))]
                by_product(out / "log.csv", lambda file: file.write("".join(lines).encode()))
                if len(log) % args.sample_every == 0 or step == steps:
                    rows = [i for i in range(len(args.prompts)) for _ in range(SAMPLES)]
                    seeds = [(args.seed, i) for i in range(SAMPLES)] * len(args.prompts)  # one noise for all rows
                    drawn = draw(ema, guide, scheduler, text, rows, seeds, args.caption_cut)
                    by_product(out / "samples" / f"epoch_{len(log):04d}.png",
                               lambda file: contact_sheet(args.prompts, drawn).save(file))
                    by_product(out / "loss.png", lambda file: loss_curve(log).savefig(file))
    if processes > 1:
        distributed.destroy_process_group()
    if rank == 0:
        print(f"stopped after step {step}; the same command with --resume goes on from {path}" if stopped else
              f"done: {path}")
    if stopped:
        sys.exit(128 + stopped)


if __name__ == "__main__":
    run(main)
