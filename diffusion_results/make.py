"""Make the pictures of this folder from the runs of train_diffusion.py. Each sheet says what its rows are.

    python diffusion_results/make.py --demo output/demo --pokemon output/pokemon-blip-captions-en-zh

The pictures are those that sample_diffusion.py draws with the same prompts, steps and guidance scale.
"""
import argparse
import shutil
import sys
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import sample_diffusion as sampling  # noqa: E402
from model import NoiseScheduler, TextEncoder, UNet, autocast, pick_device, place, to_uint8  # noqa: E402

DEMO = ["a red creature with a blue tail", "a blue creature with an orange tail and round yellow ears",
        "a green creature with a purple tail and pink wings", "a yellow creature with a purple tail"]
VIDEO = ["a cartoon pikachu with big eyes and big ears", "a red pokemon with a red fire tail",
         "a green bird with a red tail and a black nose"]
PROGRESS = ["a water type pokemon", "a dragon character with tail"]
SAMPLES = ["a blue rabbit with a yellow belly", "a drawing of a green dragon with wings",
           "a yellow bird with a long tail", "a purple ghost with red eyes", "a cartoon orange fish with big eyes",
           "a black bat with red wings"]                                        # none of them is a caption


@cache
def load(path):
    """A checkpoint, or the folder of a run -> its network, early network, scheduler, text encoder, label."""
    saved = sampling.load_checkpoint(path / "checkpoint.pt" if path.is_dir() else path)
    device = pick_device("auto")
    unet, early = (place(UNet(**saved["config"]).eval(), device) for _ in range(2))
    unet.load_state_dict(saved["ema"])
    early.load_state_dict(saved.get("early") or saved["ema"])
    trained = f"epoch {saved['epoch']}, {saved['seconds'] / 60:.0f} minutes"
    return unet, early, NoiseScheduler().to(device), TextEncoder(saved["text_encoder"]), trained


def draw(path, prompts, count=6, early=False, **options):
    """`count` pictures of each of P prompts, all from the same noise: uint8 (P * count, 3, S, S)."""
    unet, early_unet, scheduler, encoder, _ = load(path)
    amp = autocast(scheduler.sqrt_alpha_bar.device, "auto")
    rows = [i for i in range(len(prompts)) for _ in range(count)]
    seeds = [(0, n) for n in range(count)] * len(prompts)
    return sampling.draw(unet, scheduler, encoder([*prompts, ""]), rows, seeds, amp,
                         early=early_unet if early else None, **options)


def row(path, prompt, steps=sampling.STEPS, guidance_scale=sampling.GUIDANCE_SCALE, early=False):
    """A label that says how they were drawn, and six pictures of a prompt."""
    return (f"{load(path)[-1]}, {steps} steps, guidance {guidance_scale:g}{', early' * early}: {prompt}",
            draw(path, [prompt], steps=steps, guidance_scale=guidance_scale, early=early))


def save_sheet(name, rows):
    """{label: the pictures of its row} -> a file of this folder."""
    sampling.contact_sheet(list(rows), torch.cat(list(rows.values()))).save(HERE / name)


def animate(path, prompts, name):
    """A .gif of a picture for each prompt, side by side, while they come out of the noise."""
    frames = []

    def on_step(number, x_t):
        """Keep the sheet of each step."""
        frames.append(sampling.contact_sheet([f"step {number + 1} of {sampling.STEPS}"], to_uint8(x_t).cpu()))
    draw(path, prompts, count=1, on_step=on_step)
    shown = torch.linspace(0, len(frames) - 1, sampling.FRAMES).round().int().tolist()
    first, *others = [frames[i] for i in shown]
    milliseconds = [100] * len(others) + [2500]
    first.save(HERE / name, save_all=True, append_images=others, loop=0, duration=milliseconds)


def main():
    """Make the pictures of the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo", type=Path, help="a run with --demo, on whose checkpoint tests/quality.py was called")
    parser.add_argument("--pokemon", type=Path, help="a run on the pokemon drawings")
    parser.add_argument("--over-time", type=Path, nargs="+",
                        help="checkpoints of it kept on the way, the earliest first: over_time.png, progress.png")
    args = parser.parse_args()
    if args.demo:
        save_sheet("demo_samples.png", dict(row(args.demo, prompt) for prompt in DEMO))
        save_sheet("demo_steps.png", dict(row(args.demo, DEMO[2], steps) for steps in (5, 10, 25, 50, 1000)))
        animate(args.demo, DEMO, "demo_noise.gif")
        shutil.copy(args.demo / "nearest.png", HERE / "demo_nearest.png")
    if args.pokemon:
        ways = [dict(guidance_scale=1), {}, dict(early=True)]
        save_sheet("plain_and_guided.png", dict(row(args.pokemon, prompt, **way) for prompt in VIDEO for way in ways))
        save_sheet("guidance_scales.png", dict(row(args.pokemon, SAMPLES[0], guidance_scale=scale)
                                               for scale in (1, 1.5, 2, 3, 5)))
        save_sheet("pokemon_samples.png", dict(row(args.pokemon, prompt, early=True) for prompt in SAMPLES))
        shutil.copy(args.pokemon / "loss.png", HERE / "loss.png")
    if args.over_time:
        chosen = [args.over_time[round(i * (len(args.over_time) - 1) / 2)] for i in range(3)]
        save_sheet("progress.png", dict(row(path, prompt) for path in dict.fromkeys(chosen) for prompt in PROGRESS))
        save_sheet("over_time.png", {f"{load(path)[-1]}: {SAMPLES[0]}, {VIDEO[2]}":
                                     draw(path, [SAMPLES[0], VIDEO[2]], count=3) for path in args.over_time})


if __name__ == "__main__":
    main()
