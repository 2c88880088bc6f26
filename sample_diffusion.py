"""Draw pictures from prompts with a checkpoint that train_diffusion.py wrote.

    python sample_diffusion.py "a red pokemon with a red fire tail" --num-images 4
    python sample_diffusion.py "a water type pokemon" --compare       # plain above guided, from the same noise
    python sample_diffusion.py "a water type pokemon" --animate       # and a .gif of the noise turning into it

The checkpoint names the network, the noise schedule and the text encoder: nothing else has to be given.
"""
import argparse
import os
import pickle
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from model import NoiseScheduler, TextEncoder, UNet, UNetConfig, generator_for, to_uint8

FORMAT = "text-to-image-diffusion-2"  # marks a checkpoint as ours, and its version
STEPS = 50                            # denoising steps of a picture
GUIDANCE_SCALE = 3.0                  # weight of the prompt; 1 is plain conditional sampling
BATCH = 16                            # pictures drawn at once: what a 16 GB Mac takes easily
SHEET_SIZE = 128                      # smaller pictures are shown about this large on a sheet, in pixels
FRAMES = 30                           # of an animation, at the most
FRAME_TIME, LAST_FRAME_TIME = 100, 2500  # for how long each is seen, in milliseconds
MARGIN = 4                            # pixels between the pictures of a sheet
LABEL = 18                            # pixels of height for a row's label


def whole_number(text):
    """An argparse type: a whole number from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return value


def seed_number(text):
    """An argparse type: a seed, a whole number from 0 up."""
    value = int(text)
    if not 0 <= value < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2**63 - 1")
    return value


def parse_args(argv=None):
    """Command line -> namespace; argparse itself names a wrong flag and exits with 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw, one text a picture")
    parser.add_argument("--checkpoint", type=Path,
                        help="a checkpoint.pt of train_diffusion.py; if not given, the newest in output/*/")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE,
                        help="weight of the prompt; 1 is plain conditional sampling")
    parser.add_argument("--steps", type=whole_number, default=STEPS,
                        help="denoising steps; 1000 is DDPM as in the paper, fewer take several of its steps at once")
    parser.add_argument("--num-images", type=whole_number, default=1, help="pictures a prompt")
    parser.add_argument("--compare", action="store_true",
                        help="a sheet with plain sampling above guided, from the same starting noise")
    parser.add_argument("--animate", action="store_true",
                        help="also write a .gif beside --output: the noise turning into the pictures")
    parser.add_argument("--seed", type=seed_number, default=0, help="starting noise: same seed, same pictures")
    parser.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu), cuda, mps or cpu")
    parser.add_argument("--output", type=Path, default=Path("output/sample.png"),
                        help="the picture; with several, their contact sheet, and the pictures beside it, numbered")
    args = parser.parse_args(argv)
    if not all(prompt.strip() for prompt in args.prompts):
        parser.error("a PROMPT is empty")
    if not 0 <= args.guidance_scale <= 100:
        parser.error(f"--guidance-scale: {args.guidance_scale} is not between 0 and 100")
    if args.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        parser.error(f"--output: {args.output} does not end in .png, .jpg or .webp")
    return args


def pick_device(name):
    """'auto', 'cuda', 'mps' or 'cpu' -> torch.device; exits with one line where this machine has no such device."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in found.items() if there)
    if not found.get(name):
        sys.exit(f"error: --device {name}: this machine has {', '.join(d for d, there in found.items() if there)}")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # torchrun starts one process a GPU
    return torch.device(name)


def write_atomically(path, write):
    """Call write(file) on a file beside `path`, and move it into place once it is whole and on the disk.

    Whenever the power goes or the process is killed, `path` holds either the old content or the new.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with suppress(OSError):
            beside.unlink()
        sys.exit(f"error: {path} could not be written: {first_line(error)}")


def save_picture(picture, path):
    """Write a PIL picture in the format of the path's suffix."""
    picture_format = Image.registered_extensions()[path.suffix.lower()]
    write_atomically(path, lambda file: picture.save(file, format=picture_format))


def newest_checkpoint():
    """The checkpoint that was trained last in the folders that train_diffusion.py writes to by default."""
    found = sorted(Path("output").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        sys.exit("error: no output/*/checkpoint.pt here: train with train_diffusion.py first, or name a --checkpoint")
    return found[-1]


def load_checkpoint(path):
    """The dictionary that train_diffusion.py saved; exits with one line where the file is anything else."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain values, no code
    except OSError as error:
        sys.exit(f"error: checkpoint {path}: {error.strerror or error}")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError):
        sys.exit(f"error: checkpoint {path} is damaged, or not a checkpoint of train_diffusion.py")
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found != FORMAT:
        sys.exit(f"error: checkpoint {path} is not one of train_diffusion.py: its format is {found!r}, not {FORMAT!r}")
    return checkpoint


@contextmanager
def fits(path):
    """Exits with one line where what a checkpoint holds is not what this version of the code expects."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        sys.exit(f"error: checkpoint {path} does not fit this version of model.py: {first_line(error)}")


def check_writable(flag, folder):
    """Exits with one line, before any work is done, where `folder` can neither be written to nor be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        sys.exit(f"error: {flag} {folder}: {there} is no folder that can be written to")


def hub():
    """The address that models and data sets are fetched from."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def use_cache_if_unreachable(*names):
    """Where a name is no folder and the hub does not answer, have its libraries look into their cache and nowhere else.

    Left alone, they try again for minutes. To be called before they are imported.
    """
    if all(Path(name).is_dir() for name in names):
        return
    try:
        urllib.request.urlopen(hub(), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # an answer all the same
    except (OSError, ValueError):
        os.environ["HF_HUB_OFFLINE"] = "1"


def load_encoder(name):
    """TextEncoder by hub name or folder; exits with one line where it can't be had."""
    try:
        return TextEncoder(name)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            sys.exit(f"error: text encoder: {name} is no CLIP text encoder of transformers: {first_line(error)}")
        sys.exit(f"error: text encoder: {ways_out(name, '--text-encoder')}")


def first_line(error):
    """What an exception says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def ways_out(name, flag):
    """What to do when something could not be fetched."""
    return (f"{name} is no local folder and could not be fetched from {hub()}. Set HF_ENDPOINT to a mirror, "
            f"give {flag} a local folder, or train on the built-in drawings with --demo")


def draw(unet, scheduler, text, no_text, seeds, steps=STEPS, guidance_scale=GUIDANCE_SCALE, on_step=None):
    """Captions' states -> uint8 pictures (B, 3, H, W) on the CPU, one for each key of `seeds`.

    text: (states (B, L, D), mask (B, L)); no_text: the same of the empty caption, (1, L, D) and (1, L).
    seeds: B tuples of whole numbers. A picture's noise follows from its own, whatever batch it is drawn in.
    on_step: called with every x_t of every batch.
    """
    device = scheduler.signal.device
    size, pictures = unet.config.image_size, []
    for start in range(0, len(seeds), BATCH):
        generators = [generator_for(*key) for key in seeds[start:start + BATCH]]
        noise = torch.stack([torch.randn(3, size, size, generator=g) for g in generators]).to(device)
        few = tuple(part[start:start + BATCH].to(device) for part in text)
        none = tuple(part.expand(len(noise), *part.shape[1:]).contiguous().to(device) for part in no_text)
        x_0 = scheduler.sample(unet, noise, few, none, generators, steps, guidance_scale, on_step)
        pictures.append(to_uint8(x_0).cpu())
    return torch.cat(pictures)


def contact_sheet(rows):
    """[(label, uint8 pictures (B, 3, H, W))] -> one PIL picture, a labelled row for each, small pictures enlarged."""
    B, _, H, W = max((pictures for _, pictures in rows), key=len).shape
    zoom = max(1, SHEET_SIZE // W)
    H, W = zoom * H, zoom * W
    font = ImageFont.load_default(size=12)
    widths = [font.getlength(label) for label, _ in rows]
    width = int(max(B * (W + MARGIN), *widths)) + MARGIN
    sheet = Image.new("RGB", (width, len(rows) * (LABEL + H + MARGIN)), "white")
    for row, (label, pictures) in enumerate(rows):
        top = row * (LABEL + H + MARGIN)
        ImageDraw.Draw(sheet).text((MARGIN, top + 2), label, fill="black", font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(to_pil(picture).resize((W, H), Image.Resampling.NEAREST),
                        (MARGIN + column * (W + MARGIN), top + LABEL))
    return sheet


def to_pil(picture):
    """uint8 (3, H, W) -> PIL picture."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    check_writable("--output", args.output.parent)
    path = args.checkpoint or newest_checkpoint()
    checkpoint = load_checkpoint(path)
    with fits(path):
        scheduler = NoiseScheduler(checkpoint["num_timesteps"]).to(device)
        unet = UNet(UNetConfig(**checkpoint["config"])).to(device).eval()
        unet.load_state_dict(checkpoint["ema"])
        encoder_name = checkpoint["flags"]["text_encoder"]
        print(f"{path}: trained for {checkpoint['epoch']} epochs on {checkpoint['flags']['dataset']}")
    if args.steps > scheduler.num_timesteps:
        sys.exit(f"error: --steps {args.steps}: the schedule of {path} has {scheduler.num_timesteps}")

    use_cache_if_unreachable(encoder_name)
    encoder = load_encoder(encoder_name)
    if encoder.dim != unet.config.context_dim:
        sys.exit(f"error: text encoder {encoder_name} is {encoder.dim} wide; {path} was trained with one of "
                 f"{unet.config.context_dim}")
    states, mask = encoder([*args.prompts, ""])                             # one call, so all have one length L
    picture_of = torch.arange(len(args.prompts)).repeat_interleave(args.num_images)
    text, no_text = (states[picture_of], mask[picture_of]), (states[-1:], mask[-1:])
    seeds = [(args.seed, i) for _ in args.prompts for i in range(args.num_images)]  # prompts share their noise

    scales = [1.0, args.guidance_scale] if args.compare else [args.guidance_scale]
    noisy = []                                                              # every x_t, for --animate
    with tqdm(total=len(scales) * len(seeds) * args.steps, unit=" picture steps", leave=False) as bar:
        def on_step(x_t):
            """Move the bar on, and keep what --animate shows."""
            bar.update(len(x_t))
            if args.animate:
                noisy.append(to_uint8(x_t).cpu())
        drawn = [draw(unet, scheduler, text, no_text, seeds, args.steps, scale, on_step) for scale in scales]
    write_pictures(args, scales, torch.cat(drawn))
    if args.animate:
        write_animation(args, scales, noisy)


def labelled(args, scales, pictures):
    """Pictures in the order they were drawn in -> the rows of a sheet: each prompt's, at each scale."""
    groups = pictures.unflatten(0, (len(scales), len(args.prompts), args.num_images))
    return [(f"{prompt} (guidance {scale:g})", groups[s, p])
            for p, prompt in enumerate(args.prompts) for s, scale in enumerate(scales)]


def write_pictures(args, scales, pictures):
    """Save the pictures (scales * prompts * num_images, 3, H, W), several with their contact sheet, and print where."""
    if len(pictures) == 1:
        save_picture(to_pil(pictures[0]), args.output)
        print(args.output)
        return
    rows = labelled(args, scales, pictures)
    save_picture(contact_sheet(rows), args.output)
    print(args.output)
    for i, picture in enumerate(pictures for _, row in rows for pictures in row):
        path = args.output.with_stem(f"{args.output.stem}_{i:02d}")
        save_picture(to_pil(picture), path)
        print(path)


def write_animation(args, scales, noisy):
    """Save a .gif of contact sheets from `noisy`, the x_t of all steps of the first batch, then of the next ..."""
    moments = torch.linspace(0, args.steps - 1, min(FRAMES, args.steps)).round().int().tolist()
    sheets = [contact_sheet(labelled(args, scales, torch.cat(noisy[moment::args.steps]))) for moment in moments]
    times = [FRAME_TIME] * (len(sheets) - 1) + [LAST_FRAME_TIME]
    path = args.output.with_suffix(".gif")
    write_atomically(path, lambda file: sheets[0].save(file, format="GIF", save_all=True, append_images=sheets[1:],
                                                       duration=times, loop=0))
    print(path)


if __name__ == "__main__":
    main()
