"""Make the pictures of this folder from a run of train_diffusion.py, but for those of the demo.

demo_nearest.png comes from tests/quality.py, the other demo_* from sample_diffusion.py, demo_steps.png being its
pictures at --steps 5, 10, 20, 50 and 1000 side by side.

    python diffusion_results/make.py output/pokemon-blip-captions-en-zh

Everything but the progress sheet, which is cut from the run's own samples/, is drawn anew, always from seed 0.
"""
import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import sample_diffusion as sampling  # noqa: E402
from model import NoiseScheduler, UNet, UNetConfig  # noqa: E402

# The video's prompts, and some in the words that the captions of the run shown in README.md use
PROMPTS = ["a cartoon pikachu with big eyes and big ears", "a red pokemon with a red fire tail",
           "a green bird with a red tail and a black nose"]
WORDED = ["a red fire type pokemon, an animal on four legs",
          "a blue water type pokemon, a standing pokemon with a tail",
          "a green bug type pokemon, a bug with a hard shell",
          "a purple poison type pokemon, a blob with a wide base"]
SCALES = [1, 2, 3, 4, 5, 6, 7]
COLUMNS = 6


def cut(sheet, prompts, size):
    """A sheet of train_diffusion.py -> uint8 (prompts, columns, 3, size, size), the pictures that stand on it."""
    zoom = max(1, sampling.SHEET_SIZE // size)
    step, pixels = zoom * size + sampling.MARGIN, np.asarray(sheet)
    tops = [row * (step + sampling.LABEL) + sampling.LABEL for row in range(prompts)]
    lefts = range(sampling.MARGIN, pixels.shape[1] - step + sampling.MARGIN, step)
    rows = [[pixels[top:top + zoom * size:zoom, left:left + zoom * size:zoom] for left in lefts] for top in tops]
    return torch.from_numpy(np.array(rows)).permute(0, 1, 4, 2, 3)


def progress(run, prompts, size):
    """The first picture of each prompt at some epochs, evenly spread over those that were drawn."""
    paths = sorted((run / "samples").glob("epoch_*.png"))
    paths = [paths[round(i)] for i in np.linspace(0, len(paths) - 1, min(8, len(paths)))]
    sheets = torch.stack([cut(Image.open(path).convert("RGB"), len(prompts), size) for path in paths])
    epochs = ", ".join(str(int(path.stem[6:])) for path in paths)
    return [(f"{prompt} (epochs {epochs})", sheets[:, row, column])
            for row, prompt in enumerate(prompts) for column in range(2)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the folder that train_diffusion.py wrote")
    parser.add_argument("--prompts", nargs="+", default=["a water type pokemon", "a dragon character with tail"],
                        help="those that the run was started with")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    checkpoint = sampling.load_checkpoint(args.run / "checkpoint.pt")
    device = sampling.pick_device(args.device)
    unet = UNet(UNetConfig(**checkpoint["config"])).to(device).eval()
    unet.load_state_dict(checkpoint["ema"])
    scheduler = NoiseScheduler(checkpoint["num_timesteps"]).to(device)
    encoder = sampling.load_encoder(checkpoint["flags"]["text_encoder"])

    def draw(prompt, count, scale=sampling.GUIDANCE_SCALE):
        states, mask = encoder([prompt, ""])
        text = states[:1].repeat(count, 1, 1), mask[:1].repeat(count, 1)
        seeds = [(0, i) for i in range(count)]
        return sampling.draw(unet, scheduler, text, (states[1:], mask[1:]), seeds, guidance_scale=scale)

    def write(name, rows):
        sampling.save_picture(sampling.contact_sheet(rows), HERE / name)
        print(HERE / name, flush=True)

    write("progress.png", progress(args.run, args.prompts, unet.config.image_size))
    write("plain_and_guided.png", [(f"{prompt} ({kind})", draw(prompt, COLUMNS, scale=scale)) for prompt in PROMPTS
                                   for kind, scale in [("plain", 1), ("guided", sampling.GUIDANCE_SCALE)]])
    write("pokemon_samples.png", [(prompt, draw(prompt, COLUMNS)) for prompt in WORDED])
    write("guidance.png", [(f"{prompt} (guidance {', '.join(map(str, SCALES))})",
                            torch.cat([draw(prompt, 1, scale=scale) for scale in SCALES])) for prompt in PROMPTS])
    shutil.copy(args.run / "loss.png", HERE / "loss.png")


if __name__ == "__main__":
    main()
