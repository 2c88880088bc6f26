"""Shared by the tests: no network, the three scripts importable, small folders of pictures, one demo run."""
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# One thread: the demo trains on one core, the other tests run on another; two threads each would wait for each other
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=tempfile.mkdtemp(prefix="hf_home_"), OMP_NUM_THREADS="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import pytest  # noqa: E402
import torch  # noqa: E402

from model import NoiseScheduler, TextEncoder, UNet  # noqa: E402

TINY_CLIP = str(ROOT / "examples" / "tiny_clip")
HANDLERS = {getattr(signal, name): signal.getsignal(getattr(signal, name))
            for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}


def run(script, *args, cwd, timeout=600, preexec_fn=None, **environment):
    """Run one of the scripts as a user would -> subprocess.CompletedProcess with its text."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, text=True,
                          capture_output=True, timeout=timeout, preexec_fn=preexec_fn,
                          env={**os.environ, **environment})


def says_one_line(done, *words, code=1):
    """The run ended with this exit code, and with one line that holds all the words."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert all(str(word) in last for word in words), last
    return True


@pytest.fixture(autouse=True)
def signals_as_before():
    """A test that trains in this process leaves Ctrl-C to pytest afterwards."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def scheduler():
    """The noise schedule of 1,000 timesteps."""
    return NoiseScheduler()


@pytest.fixture(scope="session")
def encoder():
    """The tiny CLIP of examples/."""
    return TextEncoder(TINY_CLIP)


@pytest.fixture
def unet():
    """A small UNet, untrained."""
    torch.manual_seed(0)
    return UNet(image_size=32, channels=32, context_dim=24).eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """20 creatures at 16x16 in an imagefolder."""
    from make_examples import caption, draw, make_creature
    path = tmp_path_factory.mktemp("pictures")
    lines = []
    for number in range(20):
        creature = make_creature(0, number)
        draw(creature).resize((16, 16)).save(path / f"{number}.png")
        lines.append('{"file_name": "%d.png", "text": "%s"}\n' % (number, caption(creature, random.Random(number))))
    (path / "metadata.jsonl").write_text("".join(lines))
    return path


def small_flags(folder, path):
    """Flags of a training run that takes seconds and writes to `path`/run."""
    return ["--dataset", folder, "--text-encoder", TINY_CLIP, "--image-size", 16, "--channels", 32, "--batch-size", 4,
            "--prompts", "a red creature", "--output-dir", path / "run", "--device", "cpu"]


@pytest.fixture
def small(folder, tmp_path):
    """The same for a test's own folder."""
    return small_flags(folder, tmp_path)


def pytest_collection_modifyitems(items):
    """Tests of the demo come last: its run takes minutes."""
    items.sort(key=lambda item: "demo" in item.fixturenames)


@pytest.fixture(scope="session", autouse=True)
def demo_run(request, tmp_path_factory):
    """`python train_diffusion.py --demo`, started before the first test if any asks for it -> (process, folder)."""
    if not any("demo" in item.fixturenames for item in request.session.items):
        yield
        return
    path = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "train_diffusion.py"), "--demo"]
    with open(path / "said", "w") as said, subprocess.Popen(command, cwd=path, stdout=said, stderr=said) as process:
        yield process, path
        process.kill()


@pytest.fixture(scope="session")
def demo(demo_run):
    """The folder in which the demo ran, once it has ended."""
    process, path = demo_run
    assert process.wait(timeout=1800) == 0, (path / "said").read_text()
    torch.set_num_threads(os.cpu_count())  # both cores are free again
    return path
