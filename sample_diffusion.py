"""Draw pictures from prompts with a checkpoint that train_diffusion.py wrote.

    python sample_diffusion.py "a red pokemon with a red fire tail" --num-images 4
    python sample_diffusion.py "a water type pokemon" --guidance-scale 1 3    # plain above guided, from the same noise

It writes a sheet, output/sample.png, enlarged and labelled, and beside it each picture as drawn: sample_00.png ...
"""
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, PngImagePlugin
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from model import (NO_CAPTION, NoiseScheduler, TextEncoder, UNet, UserError, autocast, generator_for, noise_like,
                   pick_device, place, to_uint8, user_errors)

FORMAT = "text-to-image-diffusion-7"  # marks a checkpoint as ours, and its version
STEPS = 50                            # denoising steps of a picture; in 25, new prompts are laid out less well
GUIDANCE_SCALE = 2                    # weight of the prompt; 1 is plain conditional sampling
BATCH = 16                            # pictures drawn at once
SHEET_SIZE = 128                      # smaller pictures are shown about this large on a sheet, in pixels
LABEL = 18                            # height of a row's label, in pixels
FRAMES = 30                           # of an animation, at most


def draw(unet, scheduler, text, rows, seeds, amp, steps=STEPS, guidance_scale=GUIDANCE_SCALE,
         on_step=lambda step, x_t: None, early=None):
    """Captions -> uint8 pictures (B, 3, H, W) on the CPU.

    text: (states (N + 1, L, D), mask (N + 1, L)) of N captions and, last, the empty one; rows: B of them, to be drawn;
    seeds: B tuples of whole numbers, from which alone each picture's noise follows; amp: what `autocast` returns;
    on_step: called with the number of each step, from 0, and its x_t; early: as for `NoiseScheduler.sample`.
    """
    sample = scheduler.sample if steps == scheduler.num_timesteps else partial(scheduler.sample_few_steps, steps=steps)
    device, size = scheduler.sqrt_alpha_bar.device, unet.config["image_size"]
    pictures = []
    for first in range(0, len(rows), BATCH):
        generators = [generator_for(*seed) for seed in seeds[first:first + BATCH]]
        x_t = noise_like(torch.empty(len(generators), 3, size, size, device=device), generators)
        caption = [part[rows[first:first + BATCH]].to(device) for part in text]
        no_caption = [part[[NO_CAPTION] * len(generators)].to(device) for part in text]
        with amp:
            for step, x_t in enumerate(sample(unet, x_t, caption, no_caption, guidance_scale, generators, early=early)):
                on_step(step, x_t)
        pictures.append(to_uint8(x_t).cpu())
    return torch.cat(pictures)


def contact_sheet(labels, pictures):
    """uint8 pictures (R * B, 3, H, W) -> one PIL picture: a row of B for each of R labels, small pictures enlarged."""
    enlarged = F.interpolate(pictures, scale_factor=max(1, SHEET_SIZE // pictures.shape[-1]))
    grids = [to_pil_image(make_grid(row, 20, 4, pad_value=255)) for row in enlarged.chunk(len(labels))]
    height = LABEL + grids[0].height
    sheet = Image.new("RGB", (max(400, grids[0].width), height * len(grids)), "white")
    for i, (label, grid) in enumerate(zip(labels, grids)):
        ImageDraw.Draw(sheet).text((4, i * height + 2), " ".join(label.split())[:1000], "black")
        sheet.paste(grid, (0, i * height + LABEL))
    return sheet


def png_text(**about):
    """PNG metadata: Image.open(path).text shows it, and many viewers do."""
    info = PngImagePlugin.PngInfo()
    for name, value in about.items():
        info.add_itxt(name, str(value).encode("utf-8", "replace").decode().replace("\0", " "))
    return info


def run(main):
    """Call a script's main(). A UserError ends it with one line and exit code 1."""
    for stream in filter(lambda each: hasattr(each, "reconfigure"), (sys.stdout, sys.stderr)):  # not a notebook's
        stream.reconfigure(errors="backslashreplace")  # Chinese on a terminal that knows ASCII alone
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def say(*lines):
    """Print lines. If nobody reads them any more (| head), that is no reason to end a run."""
    try:
        print(*lines, sep="\n", flush=True)
    except OSError:                                    # a closed pipe or terminal
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_atomically(path, save):
    """save(another path beside it), then move that into place: never half a file. Raises UserError."""
    unfinished = path.with_stem(f"{path.stem}.tmp")    # with the same suffix, by which Pillow chooses the format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(unfinished)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:           # RuntimeError: torch.save's, of a full disk
        if os.path.exists(unfinished):
            os.unlink(unfinished)
        raise UserError(f"{path} could not be written: {error}".partition("\n")[0]) from error


def load_checkpoint(path):
    """The dictionary that train_diffusion.py saved. Raises UserError if the file is anything else."""
    with user_errors(f"checkpoint {path} can't be read as one of train_diffusion.py"):
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))  # tensors and plain values, no code
    if checkpoint.get("format") != FORMAT:
        raise UserError(f"checkpoint {path}: its format is {checkpoint.get('format')!r}, now it is {FORMAT!r}")
    return checkpoint


def number(kind, low, high, multiple_of=None):
    """An argparse type: an int or a float from low to high, and a multiple of `multiple_of` if that is given."""
    def number(text):  # the name that argparse prints in 'invalid number value'
        value = kind(text)
        if not low <= value <= high or multiple_of and value % multiple_of:
            raise ArgumentTypeError(f"{text} is not from {low} to {high}, in steps of {multiple_of or 'any size'}")
        return value
    return number


def prompt(text):
    """An argparse type: the text that was typed, also on a terminal that knows ASCII alone (LC_ALL=C)."""
    return os.fsencode(text).decode("utf-8", "replace")


def parse_args(argv=None):
    """Command line -> namespace; argparse itself names a wrong flag and exits with 2."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("prompts", type=prompt, nargs="+", metavar="PROMPT", help="what to draw")
    add("--checkpoint", type=Path, help="what train_diffusion.py wrote; if not given, the newest in output/*/")
    add("--text-encoder", help="where it is now, if the checkpoint's was moved")
    add("--guidance-scale", type=number(float, 0, 100), nargs="+", default=[GUIDANCE_SCALE],
        help="weight of the prompt; 1 is plain conditional sampling, 0 without the prompt; for several, a row each")
    add("--early", action="store_true", help="guide away from an early state of the network: for long runs")
    add("--steps", type=number(int, 1, 1000), default=STEPS, help="denoising steps; 1000 is DDPM as in the paper")
    add("--num-images", type=number(int, 1, 10_000), default=1, help="pictures per prompt")
    add("--animate", action="store_true", help="also write a .gif: the noise turning into the pictures")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="starting noise: same seed, same pictures")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu), cuda, mps or cpu")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 if CUDA or the CPU has it")
    add("--output", type=Path, default=Path("output/sample.png"), help="the sheet, a .png; overwritten if it exists")
    args = parser.parse_args(argv)
    if args.output.suffix != ".png":
        parser.error(f"--output: {args.output} does not end in .png")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    path = args.checkpoint or max(Path("output").glob("*/checkpoint.pt"), key=os.path.getmtime, default=None)
    if path is None:
        raise UserError("no output/*/checkpoint.pt here: train with train_diffusion.py first, or name a --checkpoint")
    checkpoint = load_checkpoint(path)
    with user_errors(f"checkpoint {path} does not fit this version of model.py"):
        unet, early = (place(UNet(**checkpoint["config"]).eval(), device) for _ in range(2))
        unet.load_state_dict(checkpoint["ema"])
        early.load_state_dict(checkpoint["early"] or checkpoint["ema"])
        trained_on = f"{path}: trained for {checkpoint['epoch']} epochs on {checkpoint['dataset']}"
        encoder_name = args.text_encoder or checkpoint["text_encoder"]
    text = TextEncoder(encoder_name)([*args.prompts, ""])       # one call, so all have one length L
    if text[0].shape[-1] != unet.config["context_dim"]:
        raise UserError(f"--text-encoder: {encoder_name} is {text[0].shape[-1]} wide, not {unet.config['context_dim']}")
    # A row for each prompt and guidance scale, all from the same noise
    scheduler = NoiseScheduler().to(device)
    rows = [(i, scale) for i in range(len(args.prompts)) for scale in args.guidance_scale]
    seeds = [(args.seed, i) for i in range(args.num_images)]
    frames = {step: [] for step in torch.linspace(0, args.steps - 1, FRAMES).round().int().tolist()}
    with tqdm(total=len(rows) * len(seeds) * args.steps, unit=" picture steps", leave=False) as bar:
        def on_step(step, x_t):
            bar.update(len(x_t))
            if args.animate and step in frames:
                frames[step].append(to_uint8(x_t).cpu())
        pictures = torch.cat([draw(unet, scheduler, text, [i] * len(seeds), seeds, autocast(device, args.precision),
                                   args.steps, scale, on_step, early if args.early else None) for i, scale in rows])

    # The sheet, each picture, the animation: {path: what writes it}
    labels = [f"guidance {scale:g}{', early' * args.early}: {args.prompts[i]}" for i, scale in rows]
    about = dict(seed=args.seed, steps=args.steps, early=args.early, checkpoint=trained_on)
    info = png_text(prompt=" | ".join(labels), **about)
    files = {args.output: partial(contact_sheet(labels, pictures).save, pnginfo=info)}
    for n, picture in enumerate(pictures):
        i, scale = rows[n // len(seeds)]
        info = png_text(prompt=args.prompts[i], guidance_scale=scale, number=n % len(seeds), **about)
        files[args.output.with_stem(f"{args.output.stem}_{n:02d}")] = partial(to_pil_image(picture).save, pnginfo=info)
    if args.animate:
        first, *others = [contact_sheet(labels, torch.cat(frame)) for frame in frames.values()]
        files[args.output.with_suffix(".gif")] = partial(first.save, save_all=True, append_images=others, loop=0,
                                                         duration=[100] * len(others) + [2500])  # milliseconds
    for file, save in files.items():
        write_atomically(file, save)
    say(trained_on, *files)


if __name__ == "__main__":
    run(main)
