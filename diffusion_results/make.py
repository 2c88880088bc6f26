"""Make the pictures of this folder from the runs of train_diffusion.py, by sample_diffusion.py's own command line.

    python diffusion_results/make.py --demo output/demo --pokemon output/pokemon-blip-captions-en-zh
"""
import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import sample_diffusion as sampling  # noqa: E402

DEMO = ["a red creature with a blue tail", "a blue creature with an orange tail and round yellow ears",
        "a green creature with a purple tail and pink wings", "a yellow creature with a purple tail"]
VIDEO = ["a cartoon pikachu with big eyes and big ears", "a red pokemon with a red fire tail",
         "a green bird with a red tail and a black nose"]
TRAINED_ON = ["a cartoon pikachu, a yellow animal on four legs", "a cartoon natu, a green bird with two wings"]
PROGRESS = ["a water type pokemon", "a dragon character with tail"]
WORDED = ["a red fire type pokemon, an animal on four legs",
          "a blue water type pokemon, a standing pokemon with a tail",
          "a green bug type pokemon, a bug with a hard shell", "a purple poison type pokemon, a blob with a wide base",
          "a yellow electric type pokemon, an animal on four legs", "a pink fairy type pokemon, a humanoid pokemon"]


def make(checkpoint, path, *arguments):
    """Call the sampler on a checkpoint, or a run's own, and keep the sheet, or with --animate the .gif."""
    checkpoint = checkpoint / "checkpoint.pt" if checkpoint.is_dir() else checkpoint
    with tempfile.TemporaryDirectory() as folder:
        sheet = Path(folder, "sheet.png")
        sampling.main([*arguments, "--checkpoint", str(checkpoint), "--output", str(sheet)])
        shutil.copy(sheet.with_suffix(path.suffix), path)


def below(paths, path):
    """One picture of several sheets, one below the other."""
    Image.fromarray(np.concatenate([np.asarray(Image.open(sheet).convert("RGB")) for sheet in paths])).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo", type=Path, help="a run with --demo, on whose checkpoint tests/quality.py was called")
    parser.add_argument("--pokemon", type=Path, help="a run on the pokemon drawings")
    parser.add_argument("--over-time", type=Path, nargs="+",
                        help="checkpoints of it kept on the way, the earliest first: over_time.png, progress.png")
    args = parser.parse_args()
    if args.demo:
        make(args.demo, HERE / "demo_samples.png", *DEMO, "--num-images", "6")
        make(args.demo, HERE / "demo_noise.gif", *DEMO, "--animate")
        with tempfile.TemporaryDirectory() as folder:
            sheets = [Path(folder, f"{steps}.png") for steps in (5, 10, 25, 50, 1000)]
            for sheet in sheets:
                make(args.demo, sheet, DEMO[2], "--num-images", "6", "--steps", sheet.stem)
            below(sheets, HERE / "demo_steps.png")
        shutil.copy(args.demo / "nearest.png", HERE / "demo_nearest.png")
    if args.pokemon:
        make(args.pokemon, HERE / "plain_and_guided.png", *VIDEO, "--num-images", "6", "--guidance-scale", "1",
             str(sampling.GUIDANCE_SCALE))
        make(args.pokemon, HERE / "guidance_scales.png", WORDED[0], "--num-images", "6", "--guidance-scale",
             *"1 1.5 2 3 5".split())
        make(args.pokemon, HERE / "pokemon_samples.png", *WORDED, "--num-images", "6")
        make(args.pokemon, HERE / "training_captions.png", *TRAINED_ON, "--num-images", "6")
        shutil.copy(args.pokemon / "loss.png", HERE / "loss.png")
    if args.over_time:
        with tempfile.TemporaryDirectory() as folder:
            sheets = [Path(folder, f"{i}.png") for i in range(3)]
            for sheet, i in zip(sheets, np.linspace(0, len(args.over_time) - 1, 3)):
                make(args.over_time[round(i)], sheet, *PROGRESS, "--num-images", "6")
            below(sheets, HERE / "progress.png")
        labels, rows = [], []
        for checkpoint in args.over_time:
            with tempfile.TemporaryDirectory() as folder:
                sampling.main([WORDED[0], VIDEO[2], "--num-images", "3", "--checkpoint", str(checkpoint), "--output",
                               str(Path(folder, "row.png"))])
                pictures = [pil_to_tensor(Image.open(file)) for file in sorted(Path(folder).glob("row_*.png"))]
            labels.append(f"epoch {sampling.load_checkpoint(checkpoint)['epoch']}")
            rows += pictures
        sampling.contact_sheet(labels, torch.stack(rows)).save(HERE / "over_time.png")


if __name__ == "__main__":
    main()
