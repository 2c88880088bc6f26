"""What a user gets wrong: one line that names it, an exit code, and nothing written."""
import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sample_diffusion
import train_diffusion
from model import UserError
from conftest import TINY_CLIP, run, says_one_line


def call(main, capfd, flags):
    """main(flags) -> what a shell would see of it; any exception but the one that ends a program is the test's end."""
    with pytest.raises((SystemExit, UserError)) as ended:
        main([str(flag) for flag in flags])
    if isinstance(ended.value, UserError):
        assert "\n" not in str(ended.value)
        return SimpleNamespace(returncode=1, stderr=f"error: {ended.value}")
    return SimpleNamespace(returncode=ended.value.code, stderr=capfd.readouterr().err)


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


@pytest.mark.parametrize("flags, name", [([], "openai/clip-vit-base-patch32"),
                                         (["--text-encoder", TINY_CLIP], "svjack/pokemon-blip-captions-en-zh")])
def test_what_is_on_the_hub_alone_without_the_hub(flags, name, tmp_path):
    done = run("train_diffusion.py", *flags, cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert says_one_line(done, "error: ", name, "HF_ENDPOINT", "local folder", "--demo")


def test_a_hub_that_is_out_of_reach_is_told_soon(tmp_path):
    """Nothing listens on that port. Its libraries alone would try again for minutes."""
    done = run("train_diffusion.py", cwd=tmp_path, timeout=90, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"),
               HF_ENDPOINT="http://127.0.0.1:9")
    assert says_one_line(done, "error: ", "HF_ENDPOINT", "local folder", "--demo")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("flags", [("--epochs", "0"), ("--epochs", "x"), ("--lr", "0"), ("--lr", "nan"),
                                   ("--batch-size", "-1"), ("--image-size", "60"), ("--image-size", "4096"),
                                   ("--channels", "48"), ("--seed", "-1"), ("--precision", "fp8"), ("--prompts",),
                                   ("--nonsense",), ("--sample-every", "1.5"), ("--caption-cut", "1.1")])
def test_a_flag_out_of_range(train, flags):
    assert says_one_line(train(*flags), flags[0], code=2)


def test_a_device_that_is_not_there(train, folder):
    assert says_one_line(train("--dataset", folder, "--device", "tpu"), "--device tpu", "cpu")


def test_a_wrong_column(train, folder, tmp_path):
    import datasets
    table = datasets.Dataset.from_dict(dict(image=[b"1", b"2"], text=["a", "b"]))
    table.to_parquet(str(tmp_path / "table.parquet"))
    table = tmp_path / "table.parquet"
    assert says_one_line(train("--dataset", table, "--image-column", "img"), "'img'", "image", "text")
    assert says_one_line(train("--dataset", table, "--caption-column", "label"), "'label'", "image", "text")
    assert says_one_line(train("--dataset", table, "--image-column", "text"), "'text'", "can't be read")
    assert says_one_line(train("--dataset", folder, "--caption-column", "label"), "'label'", "file_name", "text")


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
    assert says_one_line(train("--dataset", folder, "--batch-size", 32), "--batch-size 32", "18 pictures")
    assert says_one_line(train("--dataset", folder, "--text-encoder", folder), "--text-encoder", folder)


@pytest.mark.parametrize("caption", ["", "  ", None])
def test_a_missing_caption(train, folder, tmp_path, caption):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    rows = [json.loads(line) for line in open(copy / "metadata.jsonl")]
    rows[3]["text"] = caption
    (copy / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert says_one_line(train("--dataset", copy), rows[3]["file_name"], "caption is")


def damaged(kind, whole):
    """A picture file that is none -> its bytes; whole: those of a good PNG."""
    if kind == "huge":  # 20,000 x 20,000 pixels of one colour: 50 kB that would take 1.2 GB
        file = io.BytesIO()
        Image.new("1", (20_000, 20_000)).save(file, "PNG")
        return file.getvalue()
    middle = len(whole) // 2
    return {"empty": b"", "text": b"no picture", "half": whole[:middle], "header": whole[:30],
            "flipped": whole[:middle] + bytes(255 - byte for byte in whole[middle:]),
            "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>', "zeros": bytes(len(whole))}[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "half", "header", "flipped", "svg", "zeros", "huge"])
def test_a_broken_picture(train, folder, tmp_path, kind):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "7.png").write_bytes(damaged(kind, (copy / "7.png").read_bytes()))
    assert says_one_line(train("--dataset", copy), "7.png", "can't be read")


@pytest.mark.parametrize("name, content, named", [
    ("metadata.json", None, "0.txt"),                                             # misnamed: not looked at
    ("captions.jsonl", None, "0.txt"),
    ("metadata.jsonl", '{"file": "0.png", "text": "a"}', "file_name"),
    ("metadata.jsonl", '{"file_name": "missing.png", "text": "a"}', "missing.png"),
    ("metadata.jsonl", '{"file_name": "0.png"}', "text"),
    ("metadata.jsonl", '{"file_name": "0.png", "text": "a"', "metadata.jsonl"),   # cut off
    ("metadata.jsonl", "", "metadata.jsonl"),
    ("metadata.jsonl", "\0\0\0", "metadata.jsonl"),
    ("metadata.csv", "file_name;text\n0.png;a\n", "file_name"),
    ("metadata.csv", "file_name,text\n0.png,a,b,c\n0.png,a\n", "metadata.csv"),
])
def test_broken_or_misnamed_metadata(train, folder, tmp_path, name, content, named):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    right = (copy / "metadata.jsonl").read_text()
    (copy / "metadata.jsonl").unlink()
    (copy / name).write_text(right if content is None else content)
    assert says_one_line(train("--dataset", copy), copy, named)


def test_a_caption_file_that_is_no_text(train, tmp_path):
    (tmp_path / "texts").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "texts" / "a.png")
    (tmp_path / "texts" / "a.txt").write_bytes(b"\xff\xfe\xff")
    assert says_one_line(train("--dataset", tmp_path / "texts"), "a.txt")


def test_a_parquet_file_that_is_none(train, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(b"PAR1 but no more")
    assert says_one_line(train("--dataset", tmp_path / "data"), tmp_path / "data")


def save_odd_pictures(path):
    """Pictures of every kind that can be used, in a folder, each with its caption beside it, no two of them alike."""
    path.mkdir()
    shades = iter(range(0, 255, 12))

    def red(mode="RGB", size=(20, 30)):
        shade = next(shades)
        return Image.new("RGB", size, (255, shade, shade)).convert(mode)
    frames = dict(save_all=True, append_images=[Image.new("RGB", (20, 30), "blue")])
    red().save(path / "animated.gif", **frames)
    red().save(path / "animated.webp", **frames)
    red().save(path / "animated.png", **frames)
    red().save(path / "wrong suffix.jpg", format="PNG")
    red().save(path / "UPPER.JPEG")
    red("CMYK").save(path / "cmyk.jpg")
    red("L").save(path / "grey.bmp")
    red("1").save(path / "bits.tif")
    red("P").save(path / "palette.png")
    red("LA").save(path / "transparent.png")
    red("I;16").save(path / "16 bit.png")
    red(size=(1, 1)).save(path / "one pixel.png")
    red(size=(3000, 2)).save(path / "long.png")
    red(size=(6000, 4000)).save(path / "large.jpg")
    red().save(path / "a name with spaces, 100% & more.png")
    red().save(path / "Bisasam \u5999\u86d9\u79cd\u5b50 \U0001f438.png")
    (path / "sub folder").mkdir()
    red().save(path / "sub folder" / "in a folder.png")
    captions = ["a red thing", "\u7ea2\u8272\u7684", "word " * 10_000, "\U0001f438" * 50, "a\nb\tc", "\0",
                "<|endoftext|>"]
    pictures = sorted(file for file in path.rglob("*") if file.is_file())
    for number, picture in enumerate(pictures):
        picture.with_suffix(".txt").write_text(captions[number % len(captions)], encoding="utf-8")
    return pictures


def test_pictures_and_captions_of_every_usable_kind_are_trained_on(tmp_path):
    folder = tmp_path / "odd \u56fe"
    pictures = save_odd_pictures(folder)
    done = run("train_diffusion.py", "--dataset", folder, "--text-encoder", TINY_CLIP, "--image-size", 16, "--channels",
               32, "--batch-size", 4, "--epochs", 1, "--prompts", "word " * 10_000, "--output-dir", tmp_path / "out",
               cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{len(pictures) - 2} pictures to train on, 2 held out" in done.stdout
    assert "Traceback" not in done.stderr


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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What a run of one epoch saved -> a function that returns it anew."""
    path = tmp_path_factory.mktemp("trained")
    train_diffusion.main(["--demo", "--image-size", "16", "--channels", "32", "--batch-size", "128", "--epochs", "1",
                          "--prompts", "a", "--output-dir", str(path)])
    return lambda: torch.load(path / "checkpoint.pt", weights_only=True)


def of_another_version(kind, saved):
    """Change a good checkpoint into one that does not fit."""
    first = next(iter(saved["ema"]))
    if kind == "format":
        saved["format"] = "text-to-image-diffusion-0"
    elif kind == "new key":
        saved["config"]["heads"] = 8
    elif kind == "wrong width":
        saved["config"]["channels"] = 64
    elif kind == "config of another kind":
        saved["config"] = [1, 2]
    elif kind == "weight missing":
        del saved["ema"][first], saved["model"][first]
    elif kind == "weight of another shape":
        saved["ema"][first] = saved["model"][first] = torch.zeros(3)
    else:
        del saved[kind]
    return saved


@pytest.mark.parametrize("kind", ["format", "new key", "wrong width", "config of another kind", "weight missing",
                                  "weight of another shape", "ema", "config", "text_encoder", "dataset", "epoch"])
def test_a_checkpoint_of_another_version(sample, checkpoint, tmp_path, kind):
    torch.save(of_another_version(kind, checkpoint()), tmp_path / "other.pt")
    assert says_one_line(sample("a cat", "--checkpoint", tmp_path / "other.pt"), tmp_path / "other.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["other.pt"]


@pytest.mark.parametrize("kind", ["format", "weight missing", "weight of another shape", "model", "optimizers", "ema",
                                  "fingerprint", "epoch", "batch", "loss_sum", "seconds", "log", "early"])
def test_resuming_from_a_checkpoint_of_another_version(checkpoint, capfd, tmp_path, kind):
    torch.save(of_another_version(kind, checkpoint()), tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    done = call(train_diffusion.main, capfd, ["--demo", "--image-size", 16, "--channels", 32, "--batch-size", 128,
                                              "--output-dir", tmp_path, "--epochs", 1, "--resume"])
    assert says_one_line(done, tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("saved", ["evil", "missing"])
def test_resuming_from_what_is_no_checkpoint(capfd, tmp_path, monkeypatch, saved):
    monkeypatch.chdir(tmp_path)
    if saved == "evil":
        torch.save(Evil(), tmp_path / "checkpoint.pt")
    done = call(train_diffusion.main, capfd, ["--demo", "--output-dir", tmp_path, "--resume"])
    assert says_one_line(done, tmp_path / "checkpoint.pt")
    assert not (tmp_path / "executed").exists()


def test_a_text_encoder_that_was_exchanged(sample, checkpoint, tmp_path):
    from transformers import CLIPTextModel
    shutil.copytree(TINY_CLIP, tmp_path / "clip")
    wider = CLIPTextModel.from_pretrained(TINY_CLIP).config
    wider.hidden_size, wider.intermediate_size = 2 * wider.hidden_size, 2 * wider.intermediate_size
    CLIPTextModel(wider).save_pretrained(tmp_path / "clip")
    saved = checkpoint()
    saved["text_encoder"] = str(tmp_path / "clip")
    torch.save(saved, tmp_path / "other.pt")
    assert says_one_line(sample("a cat", "--checkpoint", tmp_path / "other.pt"), tmp_path / "clip", wider.hidden_size)


def test_an_output_in_something_that_is_no_folder(sample, checkpoint, folder, tmp_path):
    torch.save(checkpoint(), tmp_path / "checkpoint.pt")
    output = folder / "0.png" / "a.png"
    assert says_one_line(sample("a cat", "--checkpoint", tmp_path / "checkpoint.pt", "--steps", 1, "--output", output),
                         output, "could not be written")


@pytest.mark.parametrize("flags, named", [(["a cat"], "output/*/checkpoint.pt"), (["a cat", "--device", "tpu"], "tpu")])
def test_the_sampler_without_a_checkpoint_or_a_device(sample, flags, named):
    assert says_one_line(sample(*flags), named)


@pytest.mark.parametrize("flags", [("--steps", "0"), ("--guidance-scale", "nan"), ("--num-images", "0"),
                                   ("--guidance-scale", "1", "-1"), ("--guidance-scale",), ("--compare",),
                                   ("--seed", "x"), ("--precision", "fp8"), ("--steps", "1001")])
def test_a_sampling_flag_out_of_range(sample, flags):
    assert says_one_line(sample("a cat", *flags), flags[0], code=2)
