"""Train a text-to-image diffusion model from scratch on captioned pictures.

    python train_diffusion.py                          # the pokemon drawings of the Hugging Face Hub, at 64x64
    python train_diffusion.py --demo                   # the drawings in examples/: no data to download, a few minutes
    python train_diffusion.py --dataset my_pictures    # a folder of pictures and captions
    python train_diffusion.py --resume                 # go on where the last run stopped

It writes to --output-dir: checkpoint.pt, log.csv (a row per epoch), loss.png and samples/epoch_0010.png ...
"""
import csv
import glob
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from copy import deepcopy
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from model import (DOWNSAMPLING, HEAD_DIM, NO_CAPTION, NoiseScheduler, TextEncoder, UNet, UserError, autocast,
                   generator_for, pick_device, place, user_errors)
from sample_diffusion import (FORMAT, GUIDANCE_SCALE, STEPS, contact_sheet, draw, load_checkpoint, number, png_text,
                              prompt, run, say, write_atomically)

CAPTION_DROPOUT = 0.1    # probability that a caption is dropped in training: 'no caption' is learned too (CFG)
L1_WEIGHT = 5            # weight of the absolute error at low noise
WARMUP_STEPS = 50        # the learning rate rises over these: the optimizers' averages have to settle first
ADAMW_LR_RATIO = 0.3     # AdamW's learning rate, as a fraction of Muon's
WEIGHT_DECAY = 0.01      # of Muon and AdamW
MOMENTUM = 0.95          # of Muon
NEWTON_SCHULZ_STEPS = 5  # in Muon; with 2, samples are clearly worse
CLIP_NORM = 1.0          # longer gradients are scaled down to this norm
MAX_HELD_OUT = 32        # pictures that are never trained on; of fewer than 320, a tenth
SAMPLES = 6              # pictures of each prompt on a sample sheet
EARLY = 0.09             # share of a run after which the network is copied, for sample_diffusion.py --early
READ_EVERY = 10          # steps between readings of the loss: each waits for the device to have done its steps
SETTINGS = ("image_size", "channels", "batch_size", "lr", "caption_cut", "seed")  # of a run: --resume keeps them
SAVE_SECONDS = 600       # between checkpoints
CAPTION_COLUMNS = ("en_text", "text", "caption")  # looked for in this order; en_text is the pokemon drawings'
EXAMPLES = Path(__file__).resolve().parent / "examples"
DEMO = dict(dataset=str(EXAMPLES / "creatures"), text_encoder=str(EXAMPLES / "tiny_clip"),  # what --demo sets
            image_size=32, channels=32, epochs=36, sample_every=18, caption_cut=0,
            prompts=["a red creature with a blue tail", "a green creature with yellow wings"])


# ---------------------------------------------------------------------------------------------- the method

def training_batch(pictures, indices, scheduler, caption_cut, generator):
    """Sample a training batch on the CPU (DDPM Algorithm 1, lines 2 to 4). indices: B rows of `pictures`.

    Returns x_0 (B, 3, S, S), states (B, L, D), mask (B, L), t (B,), noise like x_0.
    """
    B = len(indices)
    # CFG Algorithm 1: now and then the caption is dropped, so that the network also learns to answer without
    dropped = torch.rand(B, generator=generator) < CAPTION_DROPOUT
    x_0, states, mask = pictures.batch(indices, torch.where(dropped, NO_CAPTION, indices))
    # Truncate captions at random, else the model memorises caption-picture pairs. CLIP reads from left to right: the
    # first states are those of a shorter caption, but for its end token
    cut = ~dropped & (torch.rand(B, generator=generator) < caption_cut)
    kept = torch.where(cut, torch.rand(B, generator=generator), 1) * mask.sum(dim=1)  # (B,) tokens, at least 1
    mask = mask & (torch.arange(mask.shape[1]) < kept.ceil().clamp(min=1)[:, None])
    flip = torch.rand(B, 1, 1, 1, generator=generator) < 0.5                    # mirror half of the pictures
    x_0 = torch.where(flip, x_0.flip(-1), x_0)
    # t is uniform on 1 ... T, and stratified: one from each of B equal intervals, so a batch sees all noise levels
    u = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    t = 1 + (u * scheduler.num_timesteps).long().clamp(max=scheduler.num_timesteps - 1)
    return x_0, states, mask, t, torch.randn(x_0.shape, generator=generator)


def diffusion_loss(unet, scheduler, x_0, states, mask, t, noise):
    """Loss of each picture: (B,). DDPM Algorithm 1, line 5, but for two things.

    The network predicts x_0, not the noise: Eq. 14 with the weight (1 - alpha_bar_t) / alpha_bar_t. And the less noise,
    the more the absolute error counts: the minimiser of the squared error is the mean of all pictures that fit, that of
    the absolute error their median, which has white backgrounds, flat colours and sharp outlines.
    """
    x_t = scheduler.add_noise(x_0, noise, t)                                    # (B, 3, S, S)
    error = unet(x_t, t, states, mask) - x_0                                    # (B, 3, S, S)
    alpha_bar = scheduler.sqrt_alpha_bar[t].square()                            # (B, 1, 1, 1)
    return (error.square() + L1_WEIGHT * alpha_bar * error.abs()).mean(dim=(1, 2, 3))


@torch.no_grad()
def validate(unet, scheduler, pictures, held_out, batch_size, seed):
    """Held-out loss with each picture's own caption, with another picture's, with none: is the text used? Three floats.

    Each picture always has the same noise and timestep, so that the numbers of two epochs can be compared.
    """
    n, device = len(held_out), scheduler.sqrt_alpha_bar.device
    t = 1 + ((torch.arange(n) + 0.5) / n * scheduler.num_timesteps).long()
    noise = torch.randn(n, *pictures.pixels.shape[1:], generator=generator_for(seed, "validation"))
    # Another picture's caption: the next one, wrapping round, that reads differently
    candidates = [*held_out.tolist() * 2, *range(len(pictures.captions))]
    others = torch.tensor([next((j for j in candidates[i:] if pictures.captions[j] != pictures.captions[row]), row)
                           for i, row in enumerate(held_out.tolist())])
    losses = []
    for captions in (held_out, others, torch.full_like(held_out, NO_CAPTION)):
        parts = zip(*(part.split(batch_size) for part in (*pictures.batch(held_out, captions), t, noise)))
        losses.append(torch.cat([diffusion_loss(unet, scheduler, *(tensor.to(device) for tensor in part))
                                 for part in parts]).mean().item())
    return losses


def orthogonalize(matrix):
    """(m, n) -> the same singular vectors, with all singular values near 1: Newton-Schulz iterations."""
    x = matrix / (matrix.norm() + 1e-7)                                         # so no singular value is above 1
    if torch.is_autocast_enabled(x.device.type):
        x = x.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x                                                     # the short side first: x x^T is small
    for _ in range(NEWTON_SCHULZ_STEPS):
        A = x @ x.mT                                                            # a singular value s of x becomes
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x                     # 3.4445 s - 4.7750 s^3 + 2.0315 s^5
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, with each update made orthogonal, so that all directions of a weight matrix learn equally fast.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon. A convolution's weight (O, I, 3, 3) is taken as (O, 9 I).
    One matrix at a time: easy to read, but a GPU waits for the start of each small product.
    """
    def __init__(self, weights, lr):
        super().__init__(weights, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        """Move every weight by one update; a tall matrix moves further."""
        for group in self.param_groups:
            for weight in group["params"]:
                gradient = weight.grad.flatten(1)                               # (m, n)
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(gradient))
                momentum.lerp_(gradient, 1 - MOMENTUM)
                nesterov = gradient.lerp(momentum, MOMENTUM)
                update = orthogonalize(nesterov).to(weight.dtype).view_as(weight)
                weight.mul_(1 - group["lr"] * WEIGHT_DECAY)                     # decoupled weight decay, as in AdamW
                weight.sub_(update, alpha=group["lr"] * max(1, gradient.shape[0] / gradient.shape[1]) ** 0.5)


def optimizers_for(unet, lr):
    """Muon for matrices; AdamW for norms, biases and the layers of t's embedding, where Muon would take too long."""
    matrices, rest = [], []
    for name, weight in unet.named_parameters():
        (matrices if weight.ndim > 1 and "time" not in name else rest).append(weight)
    return Muon(matrices, lr), torch.optim.AdamW(rest, ADAMW_LR_RATIO * lr, weight_decay=WEIGHT_DECAY, fused=True)


def learning_rate(step, steps, peak):
    """Linear warm-up, then cosine decay to 0. step = 0 ... steps - 1."""
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
    return peak * min((step + 1) / warmup, cosine)


@torch.no_grad()
def update_ema(ema, unet, step):
    """Moving average of the weights, weighted by step^8: power function EMA with gamma = 8 (EDM2, arXiv 2312.02696)."""
    for average, weight in zip(ema.parameters(), unet.parameters()):
        average.lerp_(weight, 9 / (10 + step))


class Pictures:
    """Captioned pictures in memory, decoded, resized and encoded once. rows: what read_rows returns.

    pixels (N, 3, S, S) uint8; states (tokens, D) of all captions one after the other, the empty one last.
    """
    def __init__(self, rows, size, encoder):
        for name, _, caption in rows:
            if not isinstance(caption, (str, int, float)) or caption != caption or not str(caption).strip():
                raise UserError(f"picture {name}: its caption is {caption!r:.60}")
        self.captions = [str(caption).strip().encode("utf-8", "replace").decode() for *_, caption in rows]
        self.pixels = torch.stack([decode(name, picture, size) for name, picture, _ in
                                   tqdm(rows, desc="reading pictures", leave=False)])
        texts = [*self.captions, ""]
        states = [row[real] for first in tqdm(range(0, len(texts), 64), desc="encoding captions", leave=False)
                  for row, real in zip(*encoder(texts[first:first + 64]))]
        self.states = torch.cat(states)
        self.lengths = torch.tensor([len(row) for row in states])               # (N + 1,) tokens of each caption
        self.starts = self.lengths.cumsum(dim=0) - self.lengths                 # (N + 1,) row of its first token
        self.hashes = [hashlib.sha256(picture.numpy()).hexdigest() for picture in self.pixels]
        self.fingerprint = hashlib.sha256(json.dumps([self.hashes, self.captions]).encode()).hexdigest()

    def batch(self, indices, captions):
        """B rows of pictures and B of captions -> x_0 (B, 3, S, S) in [-1, 1], states (B, L, D), mask (B, L)."""
        positions = torch.arange(self.lengths.max())                            # (L,) the same in every batch
        mask = positions < self.lengths[captions][:, None]
        tokens = (self.starts[captions][:, None] + positions) * mask            # row 0 for padding, which is masked
        return self.pixels[indices].float() / 127.5 - 1, self.states[tokens], mask

    def split(self, seed):
        """Two tensors of rows, training and held out, shuffled by the seed. A picture's rows stay together."""
        order = torch.randperm(len(self.pixels), generator=generator_for(seed, "split")).tolist()
        different = list(dict.fromkeys(self.hashes[i] for i in order))
        held_out = set(different[:min(MAX_HELD_OUT, max(1, round(len(different) / 10)))])
        return [torch.tensor([i for i in order if (self.hashes[i] in held_out) == side]) for side in (False, True)]


def decode(name, picture, size):
    """A path or the bytes of a picture file -> uint8 RGB (3, size, size), its centre square. Raises UserError."""
    with user_errors(f"picture {name} can't be read"):
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            picture = ImageOps.exif_transpose(opened)                           # upright
        if picture.mode.startswith("I"):                                        # 16 bits of grey: PIL would clip at 255
            picture = picture.convert("I").point(lambda grey: grey / 257 + 0.5).convert("L")
        if picture.has_transparency_data:                                       # on a white background
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return pil_to_tensor(ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.BILINEAR))


def read_rows(args):
    """--dataset -> [(name, picture as a path or the bytes of a file, caption)], in order. Raises UserError."""
    path = Path(args.dataset)
    # Every file below a folder, but for what is hidden, or left by a Mac's zip, by a NAS or by our scripts
    names = sorted(glob.glob("**/*", root_dir=path, recursive=True)) if path.is_dir() else [""]
    files = [path / name for name in names if os.path.isfile(path / name)
             and {"__MACOSX", "@eaDir", "output"}.isdisjoint(Path(name).parts)
             and not (path / name).absolute().is_relative_to(args.output_dir.absolute())]
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures = {file: file.with_suffix("") for file in files if file.suffix.lower() in readable}
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    unclaimed = texts.keys() - set(pictures.values())                           # of a .heic, which `decode` will name
    captioned = [file for file in files if file.suffix.lower() != ".txt"
                 and file.with_suffix("") in (texts if file in pictures else unclaimed)]
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    tables = ([file for file in files if file.name in ("metadata.csv", "metadata.jsonl")]
              or not captioned and ([file for file in parquet if file.name.startswith("train-")] or parquet))
    if tables or not os.path.exists(path):                                      # what does not exist is on the hub
        rows = [row for table in tables or [path] for row in table_rows(table, args)]
    else:
        for file in pictures:
            if file not in captioned:
                raise UserError(f"{file} has no caption: expected {file.with_suffix('.txt').name} beside it, or a "
                                "metadata.jsonl or metadata.csv with the columns file_name and text")
        rows = [(str(file), file, read(texts[file.with_suffix("")])) for file in captioned]
    if not rows:
        raise UserError(f"--dataset {path}: no rows in metadata.jsonl, .csv or .parquet; no picture (.zip: unpack it)")
    return rows


def table_rows(source, args):
    """A table -> rows. Its pictures are paths, bytes, or a struct of both. Raises UserError for a missing column."""
    is_metadata = source.suffix in (".csv", ".jsonl")
    flag, column = ("--dataset", "file_name") if is_metadata else ("--image-column", args.image_column)
    captions = [args.caption_column] if args.caption_column else CAPTION_COLUMNS
    for i, row in enumerate(read(source)):
        if None in row:                                                         # csv's name for cells beyond the header
            raise UserError(f"{source}: more cells than columns (a comma without quotes?): {row!r:.99}")
        for found_by, names in (flag, [column]), ("--caption-column", captions):
            if row.keys().isdisjoint(names):
                raise UserError(f"{found_by}: {source} has no {' or '.join(map(repr, names))}, only {', '.join(row)}")
        picture, name = row[column], f"in row {i}, column {column!r} of {source}"
        if isinstance(picture, dict):
            picture = picture.get("bytes") or picture.get("path")
        if isinstance(picture, str):
            picture, name = source.parent / picture, f"{picture} {name}"
        yield name, picture, next(row[caption] for caption in captions if caption in row)


def read(source):
    """A .txt file -> its text; a .csv, .jsonl or .parquet file or a name on the hub -> dicts. Raises UserError."""
    with user_errors(f"--dataset: {source}", source):
        if source.suffix.lower() in (".txt", ".csv", ".jsonl"):
            text = source.read_bytes().decode("utf-8-sig")                      # with a byte order mark or without
            if source.suffix == ".csv":
                return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
            if source.suffix == ".jsonl":
                return [dict(json.loads(line)) for line in text.split("\n") if line.strip()]
            return text
        import datasets  # seconds to import: only for what needs it
        import pyarrow.parquet
        if source.is_file():
            table = datasets.Dataset(datasets.table.InMemoryTable(pyarrow.parquet.read_table(source)))
        else:
            table = datasets.load_dataset(source.as_posix(), split="train")
        labels = {name: dict(enumerate(feature.names)) for name, feature in table.features.items()
                  if hasattr(feature, "names")}                                 # class labels become their names
        return [row | {name: names.get(row[name]) for name, names in labels.items()}
                for part in table.with_format("arrow").iter(100) for row in part.to_pylist()]


def by_product(path, save):
    """Write what save(path) writes; if that fails, a warning: a full disk or no matplotlib must not end the run."""
    try:
        write_atomically(path, save)
    except (UserError, ImportError) as error:
        tqdm.write(f"warning: {path} was not written: {error}", file=sys.stderr)


def plot_losses(rows, path):
    """loss.png: training loss, held-out losses and the learning rate over the epochs."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(7, 4), dpi=110, layout="constrained").subplots()
    epochs = [row["epoch"] for row in rows]
    for name in ("train_loss", "val_loss", "val_loss_shuffled", "val_loss_empty"):
        axes.plot(epochs, [float(row[name]) for row in rows], label=name.replace("_", " "))
    axes.set(xlabel="epoch", ylabel="loss", yscale="log")
    axes.legend()
    lr = axes.twinx()
    lr.plot(epochs, [float(row["lr"]) for row in rows], color="lightgrey")
    lr.set_ylabel("learning rate (grey)")
    axes.figure.savefig(path)


def parse_args(argv=None):
    """Command line -> namespace; argparse itself names a wrong flag and exits with 2."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    count = number(int, 1, 10 ** 9)
    add("--dataset", default="svjack/pokemon-blip-captions-en-zh",
        help="hub name or folder: metadata.jsonl or .csv (file_name, text), parquet files, or a .txt for each picture")
    add("--image-column", default="image", help="column that holds the pictures")
    add("--caption-column", help="column that holds the captions; if not given, " + " or ".join(CAPTION_COLUMNS))
    add("--text-encoder", default="openai/clip-vit-base-patch32", help="hub name or folder of a CLIP text encoder")
    add("--demo", action="store_true", help="train a small model on the drawings in examples/, without a network")
    add("--image-size", type=number(int, DOWNSAMPLING, 256, DOWNSAMPLING), default=64, help="pixels a side")
    add("--channels", type=number(int, HEAD_DIM, 1024, HEAD_DIM), default=64, help="width of the UNet's first level")
    add("--epochs", type=count, default=320, help="passes over the pictures, in all; it can be raised on --resume")
    add("--batch-size", type=count, default=16, help="pictures per step")
    add("--lr", type=number(float, 1e-9, 1), default=0.015, help="peak of Muon's, times sqrt(--batch-size / 16)")
    add("--caption-cut", type=number(float, 0, 1), default=0.5, help="share of captions cut after a random token")
    add("--prompts", type=prompt, nargs="+", default=["a water type pokemon", "a dragon character with tail"],
        help="what the sample sheets show")
    add("--sample-every", type=count, default=10, help="epochs between sample sheets")
    add("--output-dir", type=Path, help="where all is written; if not given, output/ and the data set's name")
    add("--resume", action="store_true", help="go on from the checkpoint in --output-dir, with its settings")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of the weights, the held-out pictures, all noise")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu), cuda, mps or cpu")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 if CUDA or the CPU has it")
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or Path("output", "demo" if args.demo else Path(args.dataset).resolve().name)
    return args


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    amp = autocast(device, args.precision)
    out = args.output_dir
    path = out / "checkpoint.pt"
    if os.path.exists(path) and not args.resume:
        raise UserError(f"{path} is there already: go on from it with --resume, or give another --output-dir")
    checkpoint = load_checkpoint(path) if args.resume else {}
    vars(args).update(checkpoint["settings"] if checkpoint else {})

    # Pictures and captions, once; then free CLIP
    encoder = TextEncoder(args.text_encoder)
    pictures = Pictures(read_rows(args), args.image_size, encoder)
    text = encoder([*args.prompts, ""])                                         # of the sample sheets
    del encoder
    training, held_out = pictures.split(args.seed)
    batches = len(training) // args.batch_size                                  # the rest waits for another epoch
    if not batches:
        raise UserError(f"--batch-size {args.batch_size}: {args.dataset} has only {len(training)} pictures to train on")

    # Network, EMA, optimizers
    torch.manual_seed(args.seed)                                                # the weights' first values
    unet = UNet(args.image_size, args.channels, pictures.states.shape[1])
    unet.text_mean, unet.text_std = pictures.states.mean(dim=0), pictures.states.std(dim=0).clamp(min=0.01)
    place(unet, device)
    ema = deepcopy(unet).eval().requires_grad_(False)                           # what validation and samples show
    optimizers = optimizers_for(unet, args.lr)
    scheduler = NoiseScheduler().to(device)

    # Training state
    first_epoch, first_batch, loss_sum, seconds, log, early = 0, 0, 0.0, 0.0, [], None  # log: a row per finished epoch
    if checkpoint:
        with user_errors(f"checkpoint {path} does not fit this version of model.py"):
            if (checkpoint["config"] != unet.config or checkpoint["fingerprint"] != pictures.fingerprint
                    or not torch.allclose(checkpoint["model"]["text_mean"], unet.text_mean.cpu(), atol=1e-2)):
                raise UserError(f"--resume: the pictures, captions or --text-encoder of {path} were others")
            unet.load_state_dict(checkpoint["model"])
            ema.load_state_dict(checkpoint["ema"])
            for optimizer, saved in zip(optimizers, checkpoint["optimizers"]):
                optimizer.load_state_dict(saved)
            first_epoch, first_batch, loss_sum, seconds, log, early = (
                checkpoint[name] for name in ("epoch", "batch", "loss_sum", "seconds", "log", "early"))

    def save(epoch, batch):
        """Write checkpoint.pt, from which --resume goes on with this batch of this epoch."""
        state = dict(format=FORMAT, config=unet.config, settings={name: getattr(args, name) for name in SETTINGS},
                     dataset=args.dataset, text_encoder=args.text_encoder, fingerprint=pictures.fingerprint,
                     epoch=epoch, batch=batch, loss_sum=float(loss_sum), seconds=time.monotonic() - began, log=log,
                     model=unet.state_dict(), ema=ema.state_dict(), early=early,
                     optimizers=[one.state_dict() for one in optimizers])
        write_atomically(path, lambda file: torch.save(state, file))
    signals = []                                                                # received

    def ask_to_stop(number, frame):
        """Ctrl-C, SIGTERM or a closed terminal: the loop stops after its step. A second one ends the run at once."""
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):             # Windows has no SIGHUP
        if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:           # nohup ignores SIGHUP
            signal.signal(getattr(signal, name), ask_to_stop)
    with user_errors(f"--output-dir {out}"):
        out.mkdir(parents=True, exist_ok=True)
    say(f"{len(training)} pictures to train on, {len(held_out)} held out; "
        f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters on {device}; writing to {out}",
        *[f"going on with epoch {first_epoch + 1}, whose end writes log.csv anew"] * bool(checkpoint))
    steps = args.epochs * batches
    peak = args.lr * (args.batch_size / 16) ** 0.5
    began = time.monotonic() - seconds                                          # as if the run had never stopped
    saved_at = time.monotonic()
    with tqdm(total=steps, initial=first_epoch * batches + first_batch, unit=" steps") as bar:
        for epoch in range(first_epoch, args.epochs):
            # All draws follow from the seed, the epoch and the batch alone: so they are the same after --resume
            order = training[torch.randperm(len(training), generator=generator_for(args.seed, "order", epoch))]
            for i in range(first_batch, batches):
                step = epoch * batches + i

                # DDPM Algorithm 1
                indices = order[i * args.batch_size:(i + 1) * args.batch_size]
                batch = training_batch(pictures, indices, scheduler, args.caption_cut,
                                       generator_for(args.seed, epoch, i))
                with amp:
                    loss = diffusion_loss(unet, scheduler, *(part.to(device) for part in batch)).mean()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), CLIP_NORM)
                for optimizer, share in zip(optimizers, (1, ADAMW_LR_RATIO)):
                    optimizer.param_groups[0]["lr"] = share * learning_rate(step, steps, peak)
                    with amp:                                                   # Muon's matrix products
                        optimizer.step()
                    optimizer.zero_grad()
                update_ema(ema, unet, step)
                if early is None and step + 1 >= EARLY * steps:
                    early = deepcopy(ema.state_dict())

                # Now and then: read the loss from the device, save; stop if asked to
                loss_sum = loss_sum + loss.detach() + 0 * norm                  # not finite if either is not
                bar.update()
                stop = len(signals)                                             # asked once: all below agrees on it
                if (i + 1) % READ_EVERY == 0 or i + 1 == batches or stop:
                    if not math.isfinite(loss_sum):
                        raise UserError(f"the loss is not finite at step {step + 1}: try a lower --lr ({out} is kept)")
                    bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.4f}", refresh=False)
                    if stop or time.monotonic() - saved_at > SAVE_SECONDS:
                        save(epoch, i + 1)
                        saved_at = time.monotonic()
                if stop:
                    say(f"stopped after step {step + 1}; the same command with --resume goes on from {path}")
                    sys.exit(128 + signals[0])
            first_batch = 0

            # The epoch's end: validation, a row for log.csv, now and then pictures
            with amp:
                right, other, empty = validate(ema, scheduler, pictures, held_out, args.batch_size, args.seed)
            log.append(dict(epoch=epoch + 1, step=(epoch + 1) * batches, lr=f"{optimizers[0].param_groups[0]['lr']:g}",
                            seconds=f"{time.monotonic() - began:.1f}", train_loss=f"{float(loss_sum) / batches:.5f}",
                            val_loss=f"{right:.5f}", val_loss_shuffled=f"{other:.5f}", val_loss_empty=f"{empty:.5f}"))
            loss_sum = 0.0
            if epoch + 1 == args.epochs:
                save(args.epochs, 0)
            lines = [",".join(map(str, line)) + "\n" for line in (log[0].keys(), *(row.values() for row in log))]
            by_product(out / "log.csv", lambda file: file.write_text("".join(lines)))
            if epoch + 1 == args.epochs or (epoch + 1) % args.sample_every == 0:
                rows = [i for i in range(len(args.prompts)) for _ in range(SAMPLES)]
                seeds = [(args.seed, i) for i in range(SAMPLES)] * len(args.prompts)  # one noise for all rows
                labels = [f"epoch {epoch + 1}, guidance {GUIDANCE_SCALE}: {words}" for words in args.prompts]
                sheet = contact_sheet(labels, draw(ema, scheduler, text, rows, seeds, amp))
                info = png_text(prompt=" | ".join(labels), seed=args.seed, steps=STEPS, dataset=args.dataset)
                by_product(out / "samples" / f"epoch_{epoch + 1:04d}.png", lambda file: sheet.save(file, pnginfo=info))
                by_product(out / "loss.png", lambda file: plot_losses(log, file))
    say(f"done: {path}")


if __name__ == "__main__":
    run(main)
