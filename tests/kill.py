"""kill -9 at random moments: nothing may be lost. Takes about five minutes; not part of the suite.

    python tests/kill.py [--times 30]

Trains on tiny pictures with a checkpoint at every reading of the loss, in the middle of an epoch and at its end, kills
it, looks at what is on the disk, resumes.
"""
import argparse
import csv
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
OFTEN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train_diffusion
train_diffusion.SAVE_SECONDS = 0
train_diffusion.READ_EVERY = 2
train_diffusion.run(train_diffusion.main)
"""


def look(out):
    """How far the checkpoint is, (0, 0) if there is none; raises if it or log.csv is damaged or lacks an epoch.

    The checkpoint's own log has a row for each finished epoch. log.csv is written at each epoch's end, before the next
    checkpoint: it may be ahead, never behind.
    """
    if not (out / "checkpoint.pt").exists():
        return 0, 0
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    epoch, logged = checkpoint["epoch"], [row["epoch"] for row in checkpoint["log"]]
    assert logged == list(range(1, epoch + 1)), (epoch, logged)
    rows = []
    if (out / "log.csv").exists():
        with open(out / "log.csv", newline="") as file:
            rows = [int(row["epoch"]) for row in csv.DictReader(file)]
    assert rows == list(range(1, len(rows) + 1)) and len(rows) >= epoch, (epoch, rows)
    return epoch, checkpoint["batch"]


def wait_for_a_checkpoint(process, path):
    """Return when the process has written it."""
    started = time.time()
    while not (path.exists() and path.stat().st_mtime > started):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=30)
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as folder:
        out, before = Path(folder) / "run", (0, 0)
        command = [sys.executable, "-c", OFTEN, "--demo", "--image-size", "16", "--channels", "32", "--batch-size",
                   "128", "--epochs", "100000", "--sample-every", "100000", "--output-dir", str(out)]
        for number in range(times):
            process = subprocess.Popen(command + ["--resume"] * out.joinpath("checkpoint.pt").exists(),
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            wait_for_a_checkpoint(process, out / "checkpoint.pt")
            time.sleep(random.uniform(0, 3))
            process.kill()
            assert process.wait() == -signal.SIGKILL, process.stderr.read()
            now = look(out)
            assert now >= before, (before, now)
            before = now
            print(f"kill {number + 1}: the checkpoint loads and goes on with epoch {now[0] + 1}, batch {now[1] + 1}; "
                  "log.csv has each epoch once", flush=True)
        names = sorted(path.name for path in out.iterdir())
        print(f"{times} kills, 0 lost; in the folder: {', '.join(names)}")


if __name__ == "__main__":
    main()
