"""Make the pictures of this folder from the folders that two runs of train_diffusion.py wrote; either may be left out.

    python diffusion_results/make.py --demo output/demo --pokemon output/pokemon-blip-captions-en-zh

progress.png is cut from the run's own samples/, loss.png is the run's own; all else is drawn anew, from seed 0. The
pokemon run has to have the default --prompts.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent)]
import quality  # noqa: E402
import sample_diffusion as sampling  # noqa: E402
import train_diffusion as train  # noqa: E402
from model import NoiseScheduler, TextEncoder, UNet, UNetConfig, ask_hub, pick_device, run, to_uint8  # noqa: E402
from model import write_atomically  # noqa: E402

COLUMNS, PADDING = 6, 4      # pictures in a row of a sheet, and pixels around each
DEMO = ["a red creature with a blue tail", "a blue creature with an orange tail and round yellow ears",
        "a green creature with a purple tail and pink wings", "a yellow creature with a purple tail"]
DEMO_STEPS = [5, 10, 20, 50, 1000]
# The video's prompts, and some in the words that the captions of the run shown in README.md use
VIDEO = ["a cartoon pikachu with big eyes and big ears", "a red pokemon with a red fire tail",
         "a green bird with a red tail and a black nose"]
WORDED = ["a red fire type pokemon, an animal on four legs",
          "a blue water type pokemon, a standing pokemon with a tail",
          "a green bug type pokemon, a bug with a hard shell",
          "a purple poison type pokemon, a blob with a wide base"]
SCALES = [1, 1.5, 2, 3, 4, 6]


class Artist:
    """A checkpoint, ready to draw."""

    def __init__(self, folder, device):
        checkpoint = sampling.load_checkpoint(folder / "checkpoint.pt")
        self.unet = UNet(UNetConfig(**checkpoint["config"])).to(device).eval()
        self.unet.load_state_dict(checkpoint["ema"])
        self.scheduler = NoiseScheduler(checkpoint["num_timesteps"]).to(device)
        ask_hub(checkpoint["flags"]["text_encoder"])
        self.encoder = TextEncoder(checkpoint["flags"]["text_encoder"])

    def draw(self, prompt, count=COLUMNS, steps=sampling.STEPS, scale=sampling.GUIDANCE_SCALE, on_step=None):
        """uint8 (count, 3, H, W), always from the same noise."""
        states, mask = self.encoder([prompt, ""])
        text = states[:1].repeat(count, 1, 1), mask[:1].repeat(count, 1)
        with tqdm(total=count * steps, desc=prompt, unit=" picture steps", leave=False) as bar:
            def every_step(x_t):
                bar.update(len(x_t))
                if on_step:
                    on_step(x_t)
            return sampling.draw(self.unet, self.scheduler, text, (states[1:], mask[1:]),
                                 [(0, i) for i in range(count)], steps, scale, every_step)


def write(name, content):
    """Bytes, or the rows of a sheet -> a file in this folder."""
    if not isinstance(content, bytes):
        content = sampling.encoded(sampling.contact_sheet(content), ".png", optimize=True)
    write_atomically(HERE / name, content)
    print(HERE / name, flush=True)


def listed(values):
    """Numbers as text: '5, 10 and 1,000'."""
    *most, last = (f"{value:,}" for value in values)
    return f"{', '.join(most)} and {last}"


def demo_pictures(folder, device):
    """demo_samples.png, demo_steps.png, demo_noise.gif, demo_nearest.png."""
    artist = Artist(folder, device)
    write("demo_samples.png", [(prompt, artist.draw(prompt)) for prompt in DEMO])
    write("demo_steps.png", [(f"{prompt} ({listed(DEMO_STEPS)} steps)",
                              torch.cat([artist.draw(prompt, 1, steps) for steps in DEMO_STEPS]))
                             for prompt in DEMO[:3]])
    noisy = [[], [], [], []]                                       # of each prompt, every x_t of one picture
    for frames, prompt in zip(noisy, DEMO, strict=True):
        artist.draw(prompt, 1, on_step=lambda x_t: frames.append(to_uint8(x_t).cpu()))
    frames = [sampling.contact_sheet([("four pictures of the demo, from noise", torch.cat(moment))])
              for moment in zip(*noisy)]
    write("demo_noise.gif", sampling.encoded(frames[0], ".gif", save_all=True, append_images=frames[1:], loop=0,
                                             duration=[100] * (len(frames) - 1) + [2500]))  # milliseconds
    trained = quality.load(folder / "checkpoint.pt", device)
    sheet = quality.nearest_sheet(trained, trained.draw(trained.first(2 * COLUMNS)))
    write("demo_nearest.png", sampling.encoded(sheet, ".png", optimize=True))


def cut(sheet, rows, size):
    """A sheet of train_diffusion.py -> uint8 (rows, SAMPLES, 3, size, size), the pictures that stand on it."""
    zoom = max(1, sampling.SHEET_SIZE // size)
    step, pixels = zoom * size + PADDING, np.asarray(sheet)
    tops = [row * (sampling.LABEL + step + PADDING) + sampling.LABEL + PADDING for row in range(rows)]
    lefts = [column * step + PADDING for column in range(train.SAMPLES)]
    found = [[pixels[top:top + zoom * size:zoom, left:left + zoom * size:zoom] for left in lefts] for top in tops]
    return torch.from_numpy(np.array(found)).permute(0, 1, 4, 2, 3)


def progress(folder, size):
    """The first two pictures of each prompt at some epochs, evenly spread over those that were drawn: a sheet's rows."""
    prompts, paths = train.parse_args([]).prompts, sorted((folder / "samples").glob("epoch_*.png"))
    paths = [paths[round(i)] for i in np.linspace(0, len(paths) - 1, min(8, len(paths)))]
    sheets = torch.stack([cut(Image.open(path).convert("RGB"), len(prompts), size) for path in paths])
    epochs = listed(int(path.stem[6:]) for path in paths)
    return [(f"{prompt} (epochs {epochs})", sheets[:, row, column])
            for row, prompt in enumerate(prompts) for column in range(2)]


def pokemon_pictures(folder, device):
    """progress.png, plain_and_guided.png, pokemon_samples.png, guidance.png, loss.png."""
    artist = Artist(folder, device)
    write("progress.png", progress(folder, artist.unet.config.image_size))
    write("plain_and_guided.png", [(f"{prompt} ({kind})", artist.draw(prompt, scale=scale)) for prompt in VIDEO
                                   for kind, scale in [("plain", 1), ("guided", sampling.GUIDANCE_SCALE)]])
    write("pokemon_samples.png", [(prompt, artist.draw(prompt)) for prompt in WORDED])
    write("guidance.png", [(f"{prompt} (guidance {listed(SCALES)})",
                            torch.cat([artist.draw(prompt, 1, scale=scale) for scale in SCALES])) for prompt in VIDEO])
    write("loss.png", (folder / "loss.png").read_bytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="what train_diffusion.py --demo wrote")
    parser.add_argument("--pokemon", type=Path, metavar="FOLDER", help="what train_diffusion.py wrote")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if not args.demo and not args.pokemon:
        parser.error("give --demo, --pokemon or both")
    if args.demo:
        demo_pictures(args.demo, pick_device(args.device))
    if args.pokemon:
        pokemon_pictures(args.pokemon, pick_device(args.device))


if __name__ == "__main__":
    run(main)
