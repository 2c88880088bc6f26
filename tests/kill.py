"""kill -9 at random moments: nothing may be lost. Takes about five minutes; not part of the suite.

    python tests/kill.py [--times 30]

Trains on tiny pictures with a checkpoint after every epoch, kills it, looks at what is on the disk, resumes.
"""
import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def look(out):
    """The checkpoint's epoch, or 0 if none was written yet; raises if it or log.csv is damaged or lacks an epoch.

    The checkpoint holds its log, and log.csv is written after it: a kill between the two leaves it one row behind.
    """
    if not (out / "checkpoint.pt").exists():
        return 0
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    epoch, logged = checkpoint["epoch"], [row["epoch"] for row in checkpoint["log"]]
    assert logged == list(range(1, epoch + 1)), (epoch, logged)
    rows = []
    if (out / "log.csv").exists():
        with open(out / "log.csv", newline="") as file:
            rows = [int(row["epoch"]) for row in csv.DictReader(file)]
    assert rows == list(range(1, len(rows) + 1)) and len(rows) in (epoch - 1, epoch), (epoch, rows)
    return epoch


def wait_for_an_epoch(process, log):
    """Return when the process has written log.csv."""
    started = time.time()
    while not (log.exists() and log.stat().st_mtime > started):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=30)
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as folder:
        out, epoch = Path(folder) / "run", 0
        command = [sys.executable, str(ROOT / "train_diffusion.py"), "--demo", "--image-size", "16", "--channels", "32",
                   "--batch-size", "128", "--epochs", "100000", "--save-every", "1", "--sample-every", "100000",
                   "--output-dir", str(out)]
        for number in range(times):
            process = subprocess.Popen(command + ["--resume"] * out.joinpath("checkpoint.pt").exists(),
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            wait_for_an_epoch(process, out / "log.csv")
            time.sleep(random.uniform(0, 3))
            process.kill()
            process.wait()
            now = look(out)
            assert now >= epoch, (epoch, now)
            epoch = now
            print(f"kill {number + 1}: checkpoint of epoch {epoch} loads, log.csv has each epoch once", flush=True)
        left = sorted(path.name for path in out.iterdir())
        print(f"{times} kills, 0 lost; in the folder: {', '.join(left)}")


if __name__ == "__main__":
    main()
