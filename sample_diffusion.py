"""Draw pictures from prompts with a checkpoint that train_diffusion.py wrote.

    python sample_diffusion.py "a red pokemon with a red fire tail" --num-images 4
    python sample_diffusion.py "a water type pokemon" --guidance-scale 1 3    # plain above guided, from the same noise
    python sample_diffusion.py "a water type pokemon" --animate               # and a .gif of the noise turning into it
"""
import os
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from model import (NoiseScheduler, TextEncoder, UNet, UserError, ask_hub, autocast, check_writable, generator_for,
                   number, pick_device, prompt, run, to_uint8, user_errors, write_atomically)

FORMAT = "text-to-image-diffusion-6"  # marks a checkpoint as ours, and its version
STEPS = 50                            # denoising steps of a picture; in 25, new prompts are laid out less well
GUIDANCE_SCALE = 2                    # weight of the prompt; 1 is plain conditional sampling
BATCH = 16                            # pictures drawn at once
SHEET_SIZE = 128                      # smaller pictures are shown about this large on a sheet, in pixels
LABEL = 18                            # pixels of height for a row's label
FRAMES = 30                           # of an animation, at the most
CJK_FONTS = ("Hiragino Sans GB.ttc", "msyh.ttc", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc")  # Pillow's shows boxes


def parse_args(argv=None):
    """Command line -> namespace; argparse itself names a wrong flag and exits with 2."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("prompts", type=prompt, nargs="+", metavar="PROMPT", help="what to draw, one text a picture")
    add("--checkpoint", type=Path, help="what train_diffusion.py wrote; if not given, the newest in output/*/")
    add("--text-encoder", help="where it lies now, if the checkpoint's was moved")
    add("--guidance-scale", type=number(float, 0, 100), nargs="+", default=[GUIDANCE_SCALE],
        help="weight of the prompt; 1 is plain conditional sampling; for each of several a row, from the same noise")
    add("--steps", type=number(int, 1, 1000), default=STEPS,
        help="denoising steps; 1000 is DDPM as in the paper, fewer take several of its steps at once")
    add("--num-images", type=number(int, 1, 10_000), default=1, help="pictures per prompt")
    add("--animate", action="store_true", help="also write a .gif: the noise turning into the pictures")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="starting noise: same seed, same pictures")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu), cuda, mps or cpu")
    add("--output", type=Path, default=Path("output/sample.png"),
        help="the picture; of several, a sheet, and the pictures beside it, numbered. If it is there already, "
             "the name gets a number: nothing is overwritten")
    args = parser.parse_args(argv)
    if args.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        parser.error(f"--output: {args.output} does not end in .png, .jpg or .webp")
    return args


def load_checkpoint(path):
    """The dictionary that train_diffusion.py saved. Raises UserError if the file is anything else."""
    with user_errors(f"checkpoint {path} can't be read as one of train_diffusion.py"):
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))  # tensors and plain values, no code
    if checkpoint.get("format") != FORMAT:
        raise UserError(f"checkpoint {path}: its format is {checkpoint.get('format')!r}, now it is {FORMAT!r}")
    return checkpoint


def draw(unet, guide, scheduler, text, rows, seeds, caption_cut, steps=STEPS, guidance_scale=GUIDANCE_SCALE,
         on_step=None):
    """Captions' states -> uint8 pictures (B, 3, H, W) on the CPU.

    guide: the network as it was early in training. text: (states (N + 1, L, D), mask (N + 1, L)) of N captions and the
    empty one; rows: B row numbers, of the captions to draw. seeds: B tuples of whole numbers. A picture's noise follows
    from its own, whatever batch it is drawn in. caption_cut: that of training. on_step: called with every x_t.
    """
    device, size, pictures = scheduler.signal_scale.device, unet.config["image_size"], []
    for start in range(0, len(seeds), BATCH):
        generators = [generator_for(*key) for key in seeds[start:start + BATCH]]
        noise = torch.stack([torch.randn(3, size, size, generator=g) for g in generators]).to(device)
        captions = [part[rows[start:start + BATCH]].to(device) for part in text]
        empty = [part[[-1] * len(noise)].to(device) for part in text]
        with autocast(device):
            x_0 = scheduler.sample(unet, guide, noise, captions, empty, generators, steps, guidance_scale, caption_cut,
                                   on_step)
        pictures.append(to_uint8(x_0).cpu())
    return torch.cat(pictures)


def contact_sheet(labels, pictures):
    """uint8 pictures (R * B, 3, H, W) -> one PIL picture: a row of B for each of R labels, small pictures enlarged."""
    from torchvision.transforms.v2.functional import to_pil_image  # a second to import: only where a sheet is made
    from torchvision.utils import make_grid
    enlarged = F.interpolate(pictures, scale_factor=max(1, SHEET_SIZE // pictures.shape[-1]))
    grids = [to_pil_image(make_grid(row, min(len(row), 20), 4, pad_value=255)) for row in enlarged.chunk(len(labels))]
    width, height = max(400, grids[0].width), LABEL + grids[0].height
    sheet = Image.new("RGB", (width, height * len(grids)), "white")
    for i, (label, grid) in enumerate(zip(labels, grids)):
        font, label = label_font(label), " ".join(label.split())[:width]         # one line, cut to the sheet's width
        while font.getlength(label) > width - 8:
            label = label.removesuffix("...")[:-1] + "..."
        ImageDraw.Draw(sheet).text((4, i * height + 2), label, "black", font)
        sheet.paste(grid, (0, i * height + LABEL))
    return sheet


def label_font(text):
    """A font that has the text's letters, if there is one."""
    for name in () if text.isascii() else CJK_FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, 12)
    return ImageFont.load_default(size=12)


def unused(path):
    """`path`, or the same with the first number at which nothing of an earlier call stands there."""
    taken = {file.stem for file in path.parent.glob("*")}
    stems = (path.stem + (f"-{n}" if n else "") for n in count())
    return path.with_stem(next(s for s in stems if not any(stem == s or stem.startswith(f"{s}_") for stem in taken)))


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    check_writable("--output", args.output.parent)
    path = args.checkpoint or max(Path("output").glob("*/checkpoint.pt"), key=os.path.getmtime, default=None)
    if path is None:
        raise UserError("no output/*/checkpoint.pt here: train with train_diffusion.py first, or name a --checkpoint")
    checkpoint = load_checkpoint(path)
    with user_errors(f"checkpoint {path} does not fit this version of model.py"):
        scheduler = NoiseScheduler(checkpoint["num_timesteps"]).to(device)
        unet, guide = (UNet(**checkpoint["config"]).to(device).eval() for _ in range(2))
        unet.load_state_dict(checkpoint["ema"])
        guide.load_state_dict(checkpoint["guide"])
        name, caption_cut = args.text_encoder or checkpoint["flags"]["text_encoder"], checkpoint["flags"]["caption_cut"]
        trained_on = f"{path}: trained for {checkpoint['epoch']} epochs on {checkpoint['dataset']}"
    ask_hub(name)
    encoder = TextEncoder(name)
    if encoder.dim != unet.config["context_dim"]:
        raise UserError(f"--text-encoder: {name} is {encoder.dim} wide, that of {path} {unet.config['context_dim']}")

    text = encoder([*args.prompts, ""])                                     # one call, so all have one length L
    rows = [(i, scale) for i in range(len(args.prompts)) for scale in args.guidance_scale]
    labels = [f"guidance {scale:g}: {args.prompts[i]}" for i, scale in rows]
    seeds = [(args.seed, i) for i in range(args.num_images)]                # the same noise in every row
    noisy = []                                                              # every x_t, for --animate
    with tqdm(total=len(labels) * len(seeds) * args.steps, unit=" picture steps", leave=False) as bar:
        def on_step(x_t):
            """Move the bar on, and keep what --animate shows."""
            bar.update(len(x_t))
            if args.animate:
                noisy.append(to_uint8(x_t).cpu())
        pictures = torch.cat([draw(unet, guide, scheduler, text, [i] * len(seeds), seeds, caption_cut, args.steps,
                                   scale, on_step) for i, scale in rows])

    images, output = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures], unused(args.output)
    files = {output: (contact_sheet(labels, pictures) if len(images) > 1 else images[0]).save}  # path: what writes it
    if len(images) > 1:
        files |= {output.with_stem(f"{output.stem}_{i:02d}"): image.save for i, image in enumerate(images)}
    if args.animate:
        moments = torch.linspace(0, args.steps - 1, min(FRAMES, args.steps)).round().int().tolist()
        frames = [contact_sheet(labels, torch.cat(noisy[moment::args.steps])) for moment in moments]
        files[output.with_suffix(".gif")] = partial(frames[0].save, save_all=True, append_images=frames[1:], loop=0,
                                                    duration=[100] * (len(frames) - 1) + [2500])  # milliseconds
    for file, save in files.items():
        write_atomically(file, save)
    print(trained_on, *files, sep="\n")


if __name__ == "__main__":
    run(main)
