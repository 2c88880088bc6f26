"""What a user gets wrong: one line that names it, an exit code, and nothing written."""
import json
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sample_diffusion
import train_diffusion
from conftest import TINY_CLIP, run, says_one_line


def call(main, capfd, flags):
    """main(flags) -> what a shell would see of it; any exception but the one that ends a program is the test's end."""
    with pytest.raises(SystemExit) as ended:
        main([str(flag) for flag in flags])
    message = ended.value.code
    if isinstance(message, str):
        assert "\n" not in message
        return SimpleNamespace(returncode=1, stderr=message)
    return SimpleNamespace(returncode=message, stderr=capfd.readouterr().err)


@pytest.fixture
def train(tmp_path, capfd):
    """train(*flags) -> how the script ended, after checking that it wrote nothing."""
    def train_with(*flags):
        out = tmp_path / "never"
        done = call(train_diffusion.main, capfd, ["--text-encoder", TINY_CLIP, "--output-dir", out, *flags])
        assert not out.exists()
        return done
    return train_with


@pytest.fixture
def sample(tmp_path, capfd, monkeypatch):
    """sample(*flags) -> how the script ended, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: call(sample_diffusion.main, capfd, flags)


@pytest.fixture
def silent_hub():
    """The address of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield "http://127.0.0.1:%d" % server.getsockname()[1]


@pytest.mark.parametrize("answer", ["refuses", "is silent"])
def test_no_hub(silent_hub, answer, tmp_path):
    endpoint = silent_hub if answer == "is silent" else "http://127.0.0.1:9"
    for flags in ([], ["--text-encoder", TINY_CLIP]):
        done = run("train_diffusion.py", *flags, cwd=tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0",
                   HF_HOME=str(tmp_path / "home"), timeout=60)
        name = "svjack/pokemon-blip-captions-en-zh" if flags else "openai/clip-vit-base-patch32"
        assert says_one_line(done, name, endpoint, "HF_ENDPOINT", "local folder", "--demo")
        assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("flags", [("--epochs", "0"), ("--epochs", "x"), ("--lr", "0"), ("--lr", "nan"),
                                   ("--batch-size", "-1"), ("--image-size", "60"), ("--image-size", "4096"),
                                   ("--channels", "20"), ("--seed", "-1"), ("--precision", "fp8"), ("--prompts",),
                                   ("--nonsense",), ("--sample-every", "0"), ("--save-every", "1.5")])
def test_a_flag_out_of_range(train, flags):
    assert says_one_line(train(*flags), flags[0], code=2)


def test_a_device_that_is_not_there(train, folder):
    assert says_one_line(train("--dataset", folder, "--device", "tpu"), "--device tpu", "cpu")


def test_a_wrong_column(train, folder):
    assert says_one_line(train("--dataset", folder, "--image-column", "img"), "'img'", "image", "text")
    assert says_one_line(train("--dataset", folder, "--caption-column", "label"), "'label'", "image", "text")
    assert says_one_line(train("--dataset", folder, "--image-column", "text"), "'text'", "no pictures")


def test_folders_without_what_is_needed(train, folder, tmp_path):
    empty, bare, bad = tmp_path / "empty", tmp_path / "bare", tmp_path / "bad"
    empty.mkdir()
    assert says_one_line(train("--dataset", empty), empty, "metadata.jsonl")
    bare.mkdir()
    Image.new("RGB", (8, 8)).save(bare / "a picture.png")
    assert says_one_line(train("--dataset", bare), "a picture.png", "a picture.txt", "metadata.jsonl")
    shutil.copytree(folder, bad)
    (bad / "metadata.jsonl").write_text("not json")
    assert says_one_line(train("--dataset", bad), bad)
    assert says_one_line(train("--dataset", folder, "--batch-size", 32), "--batch-size 32", "20 pictures")
    assert says_one_line(train("--dataset", folder, "--text-encoder", folder), "text encoder", folder)


@pytest.mark.parametrize("caption", ["", "  ", None])
def test_a_missing_caption(train, folder, tmp_path, caption):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    rows = [json.loads(line) for line in open(copy / "metadata.jsonl")]
    rows[3]["text"] = caption
    (copy / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert says_one_line(train("--dataset", copy), rows[3]["file_name"], "caption is")


@pytest.mark.parametrize("content", [b"", b"no picture", "half"])
def test_a_broken_picture(train, folder, tmp_path, content):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    whole = (copy / "7.png").read_bytes()
    (copy / "7.png").write_bytes(whole[:len(whole) // 2] if content == "half" else content)
    assert says_one_line(train("--dataset", copy), "7.png", "can't be read")


class Evil:
    """Unpickling it would write a file."""
    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("content", ["missing", "empty", "text", "other", "list", "evil", "truncated"])
def test_a_checkpoint_that_is_none(sample, tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    if content in ("empty", "text"):
        path.write_text("" if content == "empty" else "hello")
    elif content != "missing":
        saved = {"other": {"model": torch.zeros(3)}, "list": [1, 2], "evil": Evil(), "truncated": torch.zeros(999)}
        torch.save(saved[content], path)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:800])
    assert says_one_line(sample("a cat", "--checkpoint", path), path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ([] if content == "missing" else ["checkpoint.pt"])


@pytest.mark.parametrize("flags, named", [(["a cat"], "output/*/checkpoint.pt"), (["a cat", "--device", "tpu"], "tpu")])
def test_the_sampler_without_a_checkpoint_or_a_device(sample, flags, named):
    assert says_one_line(sample(*flags), named)


@pytest.mark.parametrize("flags", [("--steps", "0"), ("--guidance-scale", "nan"), ("--num-images", "0"),
                                   ("--output", "picture.txt"), ("--seed", "x")])
def test_a_sampling_flag_out_of_range(sample, flags):
    assert says_one_line(sample("a cat", *flags), flags[0], code=2)


def test_an_empty_prompt(sample):
    assert says_one_line(sample(" "), "PROMPT", code=2)
