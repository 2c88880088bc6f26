"""What people really have: folders, tables, captions, text encoders, prompts and terminals of every kind."""
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import sample_diffusion
import train_diffusion
from conftest import ROOT, TINY_CLIP, run, small_flags
from model import TextEncoder, UserError
from sample_diffusion import write_atomically

ASCII = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")  # a terminal that knows no other letters
EMBEDDINGS = pyarrow.table(dict(embedding=[[0.1, 0.2]] * 3))       # a table without pictures and captions


def picture(i):
    """The i-th of 256 small pictures, each of another colour."""
    return Image.new("RGB", (16, 16), (37 * i % 256, 101 * i % 256, 11 * i % 256))


def png(i):
    """The same as the bytes of a file."""
    file = io.BytesIO()
    picture(i).save(file, "PNG")
    return file.getvalue()


def lay(folder, names, captions=None, first=0, layout="txt"):
    """Write pictures, by default each with a .txt beside it -> the folder. layout: txt, jsonl, csv or None."""
    captions = captions or [f"number {first + i}" for i in range(len(names))]
    for i, (name, caption) in enumerate(zip(names, captions)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(first + i).save(path)
        if layout == "txt":
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    rows = [dict(file_name=name, text=caption) for name, caption in zip(names, captions)]
    if layout == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                                               encoding="utf-8")
    if layout == "csv":
        with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["file_name", "text"], *(row.values() for row in rows)])
    return folder


def parquet(path, image, text=None):
    """A parquet file with the columns image and text -> its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [f"number {i}" for i in range(len(image))] if text is None else text
    pyarrow.parquet.write_table(pyarrow.table(dict(image=image, text=text)), path)
    return path


def read(dataset, *flags, out="never"):
    """The rows of --dataset."""
    words = ["--dataset", dataset, "--output-dir", out, *flags]
    return train_diffusion.read_rows(train_diffusion.parse_args([str(word) for word in words]))


def captions(*args, **more):
    """Those of the rows, sorted, after the pictures have been decoded as well."""
    rows = read(*args, **more)
    for name, image, _ in rows:
        assert train_diffusion.decode(name, image, 16).shape == (3, 16, 16)
    return sorted(str(caption) for _, _, caption in rows)


def numbers(*those):
    """What `captions` gives for pictures that were laid down by their numbers."""
    return sorted(f"number {i}" for i in those)


def refused(function, *args):
    """function(*args) raises a UserError -> its one line."""
    with pytest.raises(UserError) as raised:
        function(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------------------------------------- names are names

@pytest.mark.parametrize("layout", ["txt", "jsonl", "csv"])
@pytest.mark.parametrize("name", ["set[1]", "train", "test", "a*b?", "text=7", "data {0}", "100%", "\u56fe"])
def test_a_folders_name_is_no_pattern_and_no_split(tmp_path, name, layout):
    lay(tmp_path / "set1", ["8.png", "9.png"], first=8, layout=layout)
    assert captions(lay(tmp_path / name, ["0.png", "1.png"], layout=layout)) == numbers(0, 1)


@pytest.mark.parametrize("layout", ["txt", "jsonl", "csv"])
def test_a_pictures_name_is_no_pattern_and_no_split(tmp_path, layout):
    names = ["photo of a train.png", "test tube.png", "validation-1.png", "x[0].png", "**.png", "a.b.c.png", "0.png"]
    assert captions(lay(tmp_path / "set", names, layout=layout)) == numbers(*range(7))


@pytest.mark.parametrize("layout", ["txt", "jsonl", "csv"])
def test_every_sub_folder_counts_with_its_own_captions(tmp_path, layout):
    for i, name in enumerate(["bus", "train", "test/ship"]):
        lay(tmp_path / "set" / name, ["0.png", "1.png"], first=2 * i, layout=layout)
    assert captions(tmp_path / "set") == numbers(*range(6))


def test_parquet_files_in_folders_of_any_name(tmp_path):
    for name in ("text=7", "image=x [1]", "_train"):
        parquet(tmp_path / "set" / name / "_part.parquet", [png(0)])
    assert captions(tmp_path / "set") == numbers(0, 0, 0)


# ---------------------------------------------------------------------------------------------- what is in a folder

@pytest.mark.parametrize("layout", ["txt", "jsonl", "parquet"])
def test_what_a_system_or_the_run_itself_left_is_passed_over(tmp_path, layout):
    folder, out = tmp_path / "set", tmp_path / "set" / "output" / "run"
    if layout == "parquet":
        parquet(folder / "a.parquet", [png(0), png(1)])
    else:
        lay(folder, ["0.png", "1.png"], layout=layout)
    (folder / "._0.png").write_bytes(b"\0\5\x16\7")
    (folder / "._a.parquet").write_bytes(b"\0\5\x16\7")
    (folder / "._metadata.jsonl").write_bytes(b"\0\5\x16\7")
    for name in ("__MACOSX", "@eaDir", ".cache", ".ipynb_checkpoints", "1/@eaDir", "output/run"):
        lay(folder / name, ["7.png"], layout=None)
        lay(folder / name, ["8.png"], layout="jsonl")
        parquet(folder / name / "train-0.parquet", [png(9)])
    assert captions(folder, out=out) == numbers(0, 1)


def test_the_output_folder_of_a_run_in_the_pictures_folder(tmp_path, monkeypatch):
    lay(tmp_path / "drawings", ["0.png", "1.png"])
    monkeypatch.chdir(tmp_path / "drawings")
    args = train_diffusion.parse_args(["--dataset", "."])
    assert args.output_dir == Path("output/drawings")
    lay(args.output_dir, ["loss.png", "samples/epoch_0010.png"], layout=None)
    lay(Path("output"), ["sample.png"], layout=None)                       # the sampler's
    assert len(train_diffusion.read_rows(args)) == 2


def test_links_are_followed(tmp_path):
    elsewhere = lay(tmp_path / "elsewhere", ["2.png", "3.png"], first=2)
    folder = lay(tmp_path / "set", ["0.png", "1.png"])
    (folder / "more").symlink_to(elsewhere)
    for name in ("5.png", "5.txt"):
        (folder / name).symlink_to(lay(tmp_path / "third", ["5.png"], first=5) / name)
    (tmp_path / "link").symlink_to(folder)
    assert captions(folder) == captions(tmp_path / "link") == numbers(0, 1, 2, 3, 5)


def test_every_suffix_that_pillow_reads_counts(tmp_path):
    kinds = Image.registered_extensions()
    names = [f"{i}{suffix}" for i, suffix in enumerate(
        (".PNG", ".jfif", ".tga", ".ppm", ".webp", ".bmp", ".tif", ".JPeG", ".avif", ".jp2"))
        if kinds.get(suffix.lower()) in Image.SAVE and kinds[suffix.lower()] in Image.OPEN]
    assert len(names) >= 8                            # the last two hang on how Pillow was built
    assert captions(lay(tmp_path, names)) == numbers(*range(len(names)))


@pytest.mark.parametrize("name", ["heron.heic", "heron.HEIF", "heron.svg", "heron.jxl", "heron"])
def test_a_captioned_picture_that_pillow_can_not_read_is_named(tmp_path, encoder, name):
    folder = lay(tmp_path / "set", ["0.png", "1.png"])
    (folder / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    (folder / "heron.txt").write_text("a grey heron")
    assert f"{folder / name} can't be read" in refused(train_diffusion.Pictures, read(folder), 16, encoder)


def test_files_that_are_no_pictures_are_passed_over(tmp_path):
    folder = lay(tmp_path, ["0.png", "1.png"])
    for name in ("README.md", "notes.txt", "0.json", "Thumbs.db", "desktop.ini", "set.zip"):
        (folder / name).write_text("something else")
    assert captions(folder) == numbers(0, 1)


def test_a_caption_with_an_upper_case_suffix(tmp_path):
    lay(tmp_path, ["0.PNG", "1.png"])
    for i in range(2):
        (tmp_path / f"{i}.txt").rename(tmp_path / f"{i}.TXT")
    assert captions(tmp_path) == numbers(0, 1)


@pytest.mark.parametrize("layout", ["txt", "jsonl"])
def test_a_folder_with_a_files_name_is_no_file(tmp_path, layout):
    lay(tmp_path, ["0.png", "1.png"], layout=layout)
    for i, name in enumerate(["1", "b.png", "c.txt", "d.d", "metadata.csv"]):        # 1 is beside 1.txt
        lay(tmp_path / name, [f"{i}.png"], first=2 + i, layout=layout)
    assert captions(tmp_path) == numbers(*range(7))


def test_a_folder_of_parquet_files_with_a_parquet_files_name(tmp_path):
    """As Spark leaves them: set.parquet/part-00000.parquet."""
    for i in range(2):
        parquet(tmp_path / "set.parquet" / f"part-0000{i}.parquet", [png(i)], [f"number {i}"])
    assert captions(tmp_path) == captions(tmp_path / "set.parquet") == numbers(0, 1)


@pytest.mark.parametrize("layout", ["jsonl", "csv"])
def test_metadata_wins_over_a_table_and_over_texts(tmp_path, layout):
    lay(tmp_path, ["0.png"], ["from a .txt"])
    pyarrow.parquet.write_table(EMBEDDINGS, tmp_path / "train-features.parquet")
    parquet(tmp_path / "old.parquet", [png(7)])
    assert captions(lay(tmp_path, ["0.png", "1.png"], layout=layout)) == numbers(0, 1)


@pytest.mark.parametrize("others", [["test-00000-of-00001"], ["test-0", "validation-0"], ["val-0", "dev-0", "old"]])
def test_parquet_files_called_train_are_trained_on_alone(tmp_path, others):
    for name in ("train-0", "train-1"):
        parquet(tmp_path / "data" / f"{name}.parquet", [png(0)], [f"of {name}"])
    for name in others:
        parquet(tmp_path / "data" / f"{name}.parquet", [png(1)])
    assert captions(tmp_path) == ["of train-0", "of train-1"]


def test_beside_captioned_pictures_a_parquet_file_is_about_something_else(tmp_path):
    """As img2dataset leaves them: 00000/000000000.jpg, .txt and .json, and 00000.parquet with their addresses."""
    lay(tmp_path / "00000", ["000000000.jpg", "000000001.jpg"], ["one", "two"])
    (tmp_path / "00000" / "000000000.json").write_text("{}")
    pyarrow.parquet.write_table(pyarrow.table(dict(url=["http://a/b.jpg"], caption=["no"])), tmp_path / "00000.parquet")
    assert [caption for _, _, caption in read(tmp_path)] == ["one", "two"]


def test_parquet_files_of_other_names_are_all_trained_on(tmp_path):
    for i, name in enumerate(["a", "test-tubes", "trains"]):
        parquet(tmp_path / f"{name}.parquet", [png(i)], [f"number {i}"])
    assert captions(tmp_path) == numbers(0, 1, 2)


def test_a_single_file(tmp_path):
    table, folder = parquet(tmp_path / "set.parquet", [png(0), png(1)]), lay(tmp_path, ["0.png"], layout="jsonl")
    assert captions(table) == numbers(0, 1)
    assert captions(folder / "metadata.jsonl") == numbers(0)
    assert "0.png" in refused(read, tmp_path / "0.png")


@pytest.mark.parametrize("name", ["set.zip", "set.tar.gz"])
def test_an_archive_has_to_be_unpacked(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(b"PK\3\4")
    for path in (tmp_path / "folder" / name, tmp_path / "folder"):
        said = refused(read, path)
        assert str(path) in said and "unpack it" in said



# ---------------------------------------------------------------------------------------------- columns and captions

def test_pictures_as_structs_bytes_and_paths(tmp_path):
    (tmp_path / "pictures").mkdir()
    picture(0).save(tmp_path / "pictures" / "0.png")
    here, there = "pictures/0.png", str(tmp_path / "pictures" / "0.png")
    columns = [[{"bytes": png(0), "path": "0.png"}], [{"bytes": png(0)}], [{"bytes": None, "path": here}],
               [{"path": there}], [png(0)], pyarrow.array([png(0)], pyarrow.large_binary()), [here], [there]]
    for i, column in enumerate(columns):
        parquet(tmp_path / f"{i}.parquet", column)
    rows = read(tmp_path)
    assert len(rows) == 8
    for name, image, caption in rows:
        assert train_diffusion.decode(name, image, 16)[:, 0, 0].tolist() == list(picture(0).getpixel((0, 0))), name


@pytest.mark.parametrize("column", [[[1, 2, 3]], [None], [7], ["not there.png"], [{"other": 1}]])
def test_a_column_without_pictures(tmp_path, column):
    parquet(tmp_path / "a.parquet", column)
    assert "a.parquet" in refused(captions, tmp_path)


@pytest.mark.parametrize("column, said", [
    ([7, 8], ["7", "8"]), ([0.5, 2.0], ["0.5", "2.0"]), ([True, False], ["False", "True"]),
    (pyarrow.array(["a", "b"], pyarrow.large_string()), ["a", "b"]),
    (pyarrow.array(["a", "b"]).dictionary_encode(), ["a", "b"])])
def test_captions_in_other_types(tmp_path, encoder, column, said):
    parquet(tmp_path / "a.parquet", [png(0), png(1)], column)
    assert captions(tmp_path) == said
    train_diffusion.Pictures(read(tmp_path), 16, encoder)


def labelled(path, labels):
    """A parquet file with labels of two classes in the column label."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a red cat", "a dog"]))
    rows = dict(image=[{"bytes": png(i), "path": None} for i in range(len(labels))], label=labels)
    datasets.Dataset.from_dict(rows, features).to_parquet(str(path))


def test_class_labels_are_their_names(tmp_path):
    labelled(tmp_path / "a.parquet", [0, 1, 0])
    assert captions(tmp_path, "--caption-column", "label") == ["a dog", "a red cat", "a red cat"]


@pytest.mark.parametrize("label", [-1, None])
def test_a_picture_without_a_class_is_named(tmp_path, encoder, label):
    labelled(tmp_path / "a.parquet", [0, 1, label])
    said = refused(lambda: train_diffusion.Pictures(read(tmp_path, "--caption-column", "label"), 16, encoder))
    assert "row 2, column 'image'" in said and "a.parquet" in said


@pytest.mark.parametrize("caption", [None, "", " \n", ["a", "b"], {"en": "a"}, float("nan")])
def test_a_caption_that_is_none_is_named(tmp_path, encoder, caption):
    parquet(tmp_path / "a.parquet", [png(0)], pyarrow.array([caption]))
    assert "its caption is" in refused(lambda: train_diffusion.Pictures(read(tmp_path), 16, encoder))


def test_cells_of_a_csv_are_text(tmp_path):
    texts = ["None", "null", "NA", "nan", "007", "1e5", "True", "a, b", 'a "b"', "two\nlines", "\u7ea2", "a 5\" bird"]
    folder = lay(tmp_path, [f"{i}.png" for i in range(len(texts))], texts, layout="csv")
    assert captions(folder) == sorted(texts)


def test_a_csv_with_an_unquoted_comma_is_refused(tmp_path):
    """Its caption would be cut at the comma."""
    lay(tmp_path, ["0.png", "1.png"], layout=None)
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a bird\n1.png,a red bird, with wings\n")
    assert "metadata.csv" in refused(read, tmp_path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_a_byte_order_mark_change_nothing(tmp_path, encoder, mark, end):
    found = set()
    for layout, name in (("txt", "0.txt"), ("csv", "metadata.csv"), ("jsonl", "metadata.jsonl")):
        folder = lay(tmp_path / layout, ["0.png", "1.png"], ["a red bird", "\u7ea2"], layout=layout)
        text = (folder / name).read_bytes().decode().replace("\r\n", "\n").replace("\n", end)
        (folder / name).write_bytes((mark + text + end * (layout == "txt")).encode())
        found.add(train_diffusion.Pictures(read(folder), 16, encoder).fingerprint)
    plain = lay(tmp_path / "plain", ["0.png", "1.png"], ["a red bird", "\u7ea2"], layout="jsonl")
    assert found == {train_diffusion.Pictures(read(plain), 16, encoder).fingerprint}


def test_a_text_in_another_encoding_is_named(tmp_path):
    for name in ("0.txt", "metadata.csv", "metadata.jsonl"):
        folder = lay(tmp_path / name, ["0.png"])
        (folder / name).write_bytes("a red bird".encode("utf-16"))
        assert name in refused(read, folder)


def test_half_a_letter_at_a_captions_end_does_no_harm(tmp_path, encoder):
    """What a program leaves that cuts a text in the middle of an emoji."""
    lay(tmp_path, ["0.png"], layout=None)
    (tmp_path / "metadata.jsonl").write_text(r'{"file_name": "0.png", "text": "a red bird \ud83d"}')
    assert len(train_diffusion.Pictures(read(tmp_path), 16, encoder).pixels) == 1


def test_file_names_in_metadata(tmp_path):
    lay(tmp_path / "set" / "sub", ["0.png"], layout=None)
    lay(tmp_path / "beside", ["1.png"], layout=None)
    names = ["./sub/0.png", "sub//0.png", "../beside/1.png", str(tmp_path / "beside" / "1.png")]
    text = "".join(json.dumps(dict(file_name=name, text="a")) + "\n" for name in names)
    (tmp_path / "set" / "metadata.jsonl").write_text(text)
    assert captions(tmp_path / "set") == ["a"] * 4


@pytest.mark.parametrize("name", ["", ".", "x" * 5000, "a\0b.png", None, 7, "missing.png"])
def test_a_file_name_that_names_nothing(tmp_path, encoder, name):
    (tmp_path / "metadata.jsonl").write_text(json.dumps(dict(file_name=name, text="a")))
    assert "metadata.jsonl" in refused(lambda: train_diffusion.Pictures(read(tmp_path), 16, encoder))


# ---------------------------------------------------------------------------------------------- the hub

@pytest.fixture
def hub(monkeypatch):
    """hub(answer): load_dataset's splits, or the exception that it raises."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def answers(answer):
        def load_dataset(name, split):
            if isinstance(answer, Exception):
                raise answer
            if split not in answer:                                         # as datasets itself says it
                raise ValueError(f'Unknown split "{split}". Should be one of {list(answer)}.')
            return answer[split]
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return answers


@pytest.fixture
def table():
    rows = dict(image=[{"bytes": png(0), "path": None}], text=["number 0"])
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def test_the_split_train_is_used(hub, table):
    hub(dict(test=table.remove_columns("text"), train=table))
    assert captions("owner/name") == numbers(0)
    hub(dict(a=table, b=table))
    assert all(word in refused(read, "owner/name") for word in ("owner/name", '"train"', "'a', 'b'"))


def test_what_the_hub_said_is_kept(hub):
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as cause:
            raise RuntimeError("An error occurred while generating the dataset") from cause
    except RuntimeError as error:
        hub(error)
    said = refused(read, "owner/name")
    assert "--dataset: owner/name: [Errno 28] No space left on device" in said
    hub(ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'zh']"))
    assert "--dataset: owner/name: Config name is missing" in refused(read, "owner/name")


# ---------------------------------------------------------------------------------------------- split, fingerprint

def test_five_captions_of_a_picture_stay_on_one_side(tmp_path, encoder):
    folder = lay(tmp_path, [f"{i}.png" for i in range(12)], layout=None)
    for i in range(12):
        shutil.copy(folder / f"{i}.png", folder / f"the same as {i}.png")
    rows = [dict(file_name=name, text=f"in words {words}") for i in range(12)
            for words, name in enumerate([f"{i}.png"] * 3 + [f"the same as {i}.png"] * 2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pictures = train_diffusion.Pictures(read(folder), 16, encoder)
    for seed in range(5):
        training, held_out = (side.tolist() for side in pictures.split(seed))
        assert sorted(training + held_out) == list(range(60)) and len(held_out) % 5 == 0 < len(held_out)
        assert not {i // 5 for i in training} & {i // 5 for i in held_out}


def test_the_fingerprint_follows_the_content_wherever_it_lies(tmp_path, encoder):
    def fingerprint(path, *flags):
        return train_diffusion.Pictures(read(path, *flags), 16, encoder).fingerprint
    names = ["Blz.png", "Bl\u00e4tter.png", "sub/0.png"]
    folder = lay(tmp_path / "set", names)
    before = fingerprint(folder)
    (tmp_path / "link").symlink_to(shutil.copytree(folder, tmp_path / "copy"))
    assert fingerprint(f"{folder}/") == fingerprint(os.path.relpath(folder)) == fingerprint(tmp_path / "link") == before
    assert fingerprint(lay(tmp_path / "renamed", names, ["x", "y", "z"])) != before
    assert fingerprint(lay(tmp_path / "others", names, list("xyz"), first=9)) != fingerprint(tmp_path / "renamed")
    assert fingerprint(lay(tmp_path / "more", [*names, "z.png"])) != before
    assert fingerprint(lay(tmp_path / "fewer", names[:2])) != before


def test_another_caption_column_is_another_fingerprint(tmp_path, encoder):
    rows = dict(image=[png(0)], text=["a"], zh_text=["\u7ea2"])
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    found = {train_diffusion.Pictures(read(tmp_path, "--caption-column", name), 16, encoder).fingerprint
             for name in ("text", "zh_text")}
    assert len(found) == 2


# ---------------------------------------------------------------------------------------------- text encoders

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 2345678\n"
SMALL = dict(vocab_size=576, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def change_weights(folder, change):
    """Replace an encoder's named weights by what change(weights) makes of them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_config(folder, **values):
    """Overwrite values in an encoder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def without(*names):
    """A function that removes files from a folder."""
    return lambda folder: [(folder / name).unlink() for name in names]


def under_prefix(prefix):
    """A function that puts a prefix before the names of an encoder's weights."""
    return lambda folder: change_weights(folder, lambda weights: {prefix + k: v for k, v in weights.items()})


def of_kind(name, **config):
    """A function that saves another model of transformers into a folder."""
    kind = getattr(transformers, name)
    return lambda folder: kind(kind.config_class(**(config or SMALL))).save_pretrained(folder)


def whole_clip(folder):
    """Both halves of a CLIP, the text half being that which lies in the folder."""
    text = transformers.CLIPTextConfig.from_pretrained(folder).to_dict()
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                  patch_size=16)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.save_pretrained(folder)


def as_bin(folder):
    """The weights in the older format."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BAD_ENCODERS = dict(
    layer=lambda folder: change_weights(folder, lambda weights: {k: v for k, v in weights.items() if ".0." not in k}),
    one_weight=lambda folder: change_weights(folder, lambda weights: dict(list(weights.items())[1:])),
    prefix=under_prefix("module."),
    another_prefix=under_prefix("cond_stage_model.transformer."),
    shape=lambda folder: change_config(folder, hidden_size=64),
    more_layers=lambda folder: change_config(folder, num_hidden_layers=3),
    vocabulary_size=lambda folder: change_config(folder, vocab_size=49408),
    t5=of_kind("T5EncoderModel", vocab_size=576, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2),
    bert=of_kind("BertModel"),
    gpt2=of_kind("GPT2Model", vocab_size=576, n_embd=32, n_layer=2, n_head=2),
    siglip=of_kind("SiglipTextModel"),
    no_tokenizer=without("vocab.json", "merges.txt", "tokenizer_config.json"),
    no_vocabulary=without("vocab.json"),
    no_merges=without("merges.txt"),
    no_config=without("config.json"),
    no_weights=without("model.safetensors"),
    pointer=lambda folder: (folder / "model.safetensors").write_text(LFS),
    pointer_to_vocabulary=lambda folder: (folder / "vocab.json").write_text(LFS),
    cut_off=lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
    empty=lambda folder: [file.unlink() for file in folder.iterdir()],
)


@pytest.mark.parametrize("kind", BAD_ENCODERS)
def test_a_folder_that_is_no_whole_text_encoder_is_named(tmp_path, kind):
    folder = shutil.copytree(TINY_CLIP, tmp_path / "my encoder")
    BAD_ENCODERS[kind](folder)
    said = refused(TextEncoder, str(folder))
    assert str(folder) in said
    assert "HF_ENDPOINT" not in said and "no local folder" not in said    # the folder is there: no network's fault


@pytest.mark.parametrize("change", [whole_clip, as_bin, without("tokenizer_config.json"), lambda folder: None])
def test_other_forms_of_the_same_text_encoder_give_the_same_states(tmp_path, encoder, change):
    folder = shutil.copytree(TINY_CLIP, tmp_path / "\u7f16\u7801\u5668 [1]")
    change(folder)
    texts = ["a red bird", "a blue creature with a yellow tail", ""]
    for found, expected in zip(TextEncoder(str(folder))(texts), encoder(texts)):
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_text_encoder_that_is_nowhere_is_named():
    said = refused(TextEncoder, "owner/not-there")
    assert "owner/not-there" in said and "HF_ENDPOINT" in said and "--demo" in said


# ---------------------------------------------------------------------------------------------- the sampler

@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run of one epoch -> its folder; the text encoder of it lies beside it, in `clip`."""
    path = tmp_path_factory.mktemp("trained")
    flags = small_flags(folder, path)
    flags[flags.index(TINY_CLIP)] = shutil.copytree(TINY_CLIP, path / "clip")
    train_diffusion.main([str(flag) for flag in (*flags, "--epochs", 1)])
    return path


@pytest.fixture
def sample(trained, tmp_path, monkeypatch):
    """sample(*flags): draw in an empty folder with two steps -> the names of the new files there."""
    monkeypatch.chdir(tmp_path)

    def sample(*flags):
        before = {file.name for file in tmp_path.iterdir()}
        words = ["--checkpoint", trained / "run" / "checkpoint.pt", "--steps", 2, "--output", "fire.png", *flags]
        sample_diffusion.main([str(word) for word in words])
        return sorted({file.name for file in tmp_path.iterdir()} - before)
    return sample


@pytest.mark.parametrize("prompt", ["a red bird " * 1000, "W" * 10_000, "one\ntwo\r\n\n\tthree", "\u7ea2\u8272" * 5000,
                                    "\U0001f438", "a\0b\x1b[31m", "<|endoftext|>", "%s {0} \\n", "", " \n"])
def test_any_prompt_gives_a_sheet_of_the_same_size(sample, tmp_path, prompt):
    assert sample(prompt, "--num-images", 2) == ["fire.png", "fire_00.png", "fire_01.png"]
    with Image.open(tmp_path / "fire.png") as sheet:
        plain = sample_diffusion.contact_sheet(["a"], torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
        assert sheet.size == plain.size


def test_a_label_is_one_line():
    pictures = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    sheets = [sample_diffusion.contact_sheet([label], pictures) for label in ("one two", " one\n\r\n two\n", "one")]
    assert sheets[0].tobytes() == sheets[1].tobytes() != sheets[2].tobytes()


def test_a_sheet_of_many_pictures_can_be_saved(tmp_path):
    """After 20 pictures the row goes on below: 600 side by side would be wider than any screen."""
    sheet = sample_diffusion.contact_sheet(["a red bird"], torch.zeros(600, 3, 16, 16, dtype=torch.uint8))
    write_atomically(tmp_path / "sheet.png", sheet.save)
    with Image.open(tmp_path / "sheet.png") as found:
        assert found.size == sheet.size and found.width < 3000


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_what_is_there_is_overwritten_and_nothing_else(sample, tmp_path):
    assert sample("a", "--num-images", 3) == ["fire.png", "fire_00.png", "fire_01.png", "fire_02.png"]
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sample("b", "--seed", 1) == []
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"fire.png", "fire_00.png"}


def test_a_single_picture_has_its_sheet_and_its_raw_picture(sample, tmp_path):
    """On the sheet it is enlarged: a picture of 16 pixels is a thumbnail. Both hold the same pixels."""
    assert sample("a red bird") == ["fire.png", "fire_00.png"]
    raw, sheet = pixels(tmp_path / "fire_00.png"), pixels(tmp_path / "fire.png")
    times = sample_diffusion.SHEET_SIZE // 16
    top = sample_diffusion.LABEL                                            # a single one has no border
    assert raw.shape == (16, 16, 3) and times == 8
    assert np.array_equal(sheet[top:top + 128, :128], raw.repeat(times, axis=0).repeat(times, axis=1))
    assert sheet[:sample_diffusion.LABEL].min() < 128                       # the label


def test_each_png_says_how_it_was_drawn(sample, trained, tmp_path):
    names = sample("a red bird", "\u7ea2\u8272 | \U0001f438\0", "--num-images", 2, "--guidance-scale", 1, 2.5,
                   "--seed", 7)
    assert names == ["fire.png"] + [f"fire_0{i}.png" for i in range(8)]
    texts = {}
    for name in names:
        with Image.open(tmp_path / name) as image:
            texts[name] = image.text
    prompts = ["a red bird", "\u7ea2\u8272 | \U0001f438 "]                    # the format ends a text at a NUL
    found = [(texts[name]["prompt"], float(texts[name]["guidance_scale"]), int(texts[name]["number"]))
             for name in names[1:]]
    assert found == [(prompt, scale, number) for prompt in prompts for scale in (1, 2.5) for number in range(2)]
    sheet = texts["fire.png"]["prompt"]                                     # of all its rows
    assert all(f"guidance {scale}: {prompt}" in sheet for prompt in prompts for scale in ("1", "2.5"))
    for text in texts.values():
        assert text["seed"] == "7" and text["steps"] == "2"
        assert str(trained / "run" / "checkpoint.pt") in text["checkpoint"] and "1 epoch" in text["checkpoint"]


def test_a_picture_can_be_drawn_again_from_what_its_png_says(sample, tmp_path):
    sample("a red bird", "a blue bird", "--num-images", 3, "--guidance-scale", 1, 3, "--seed", 5)
    with Image.open(tmp_path / "fire_11.png") as image:                     # the last
        text = image.text
    sample(text["prompt"], "--guidance-scale", text["guidance_scale"], "--seed", text["seed"], "--steps", text["steps"],
           "--num-images", int(text["number"]) + 1, "--output", "again.png")
    again = tmp_path / f"again_{int(text['number']):02d}.png"
    assert abs(pixels(again) - pixels(tmp_path / "fire_11.png")).max() <= 4  # other batches, other rounding
    assert abs(pixels(tmp_path / "again_00.png") - pixels(again)).mean() > 4


def test_guidance_scale_0_is_the_empty_prompt_at_scale_1(sample, tmp_path):
    sample("a red bird", "", "--guidance-scale", 0, 1, "--precision", "fp32")
    without, plain, empty_without, empty = [pixels(tmp_path / f"fire_0{i}.png") for i in range(4)]
    assert abs(without - empty).max() <= 1 >= abs(empty_without - empty).max()
    assert abs(plain - empty).max() > 1                                     # and the text counts


def test_early_changes_what_is_guided_alone_and_says_so(sample, tmp_path):
    drawn = {}
    for flags in ([], ["--early"]):
        sample("a red bird", "--guidance-scale", 1, 3, *flags)
        drawn[len(flags)] = [pixels(tmp_path / f"fire_0{i}.png") for i in range(2)]
    assert np.array_equal(drawn[0][0], drawn[1][0]) and not np.array_equal(drawn[0][1], drawn[1][1])
    with Image.open(tmp_path / "fire.png") as image:
        assert "guidance 3, early: a red bird" in image.text["prompt"] and image.text["early"] == "True"


@pytest.mark.parametrize("steps, at_most, kept", [(9, 4, [0, 3, 5, 8]), (3, 4, [0, 1, 2]), (1, 4, [0])])
def test_an_animation_keeps_no_more_than_its_frames(sample, tmp_path, monkeypatch, steps, at_most, kept):
    """Of 1,000 steps of 100 pictures, all x_t would be gigabytes."""
    converted, shown, to_uint8 = [], [], sample_diffusion.to_uint8
    step = sample_diffusion.NoiseScheduler.step

    def watched_step(*args):
        shown.append(step(*args))
        return shown[-1]
    monkeypatch.setattr(sample_diffusion.NoiseScheduler, "step", watched_step)
    monkeypatch.setattr(sample_diffusion, "to_uint8", lambda x: converted.append(x) or to_uint8(x))
    monkeypatch.setattr(sample_diffusion, "FRAMES", at_most)
    assert "fire.gif" in sample("a red bird", "--animate", "--steps", steps, "--num-images", 2)
    *frames, result = converted
    assert [number for frame in frames for number, x_t in enumerate(shown) if x_t is frame] == kept
    assert result is shown[-1] and len(shown) == steps
    with Image.open(tmp_path / "fire.gif") as gif:
        assert gif.n_frames == len(kept)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_sampler_computes_in_the_precision_asked_for(sample, monkeypatch, precision):
    """Without the flag, one seed would give other pictures on a machine with bf16."""
    seen, forward = [], sample_diffusion.UNet.forward

    def watched(*args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(*args)
    monkeypatch.setattr(sample_diffusion.UNet, "forward", watched)
    sample("a red bird", "--device", "cpu", "--precision", precision)
    assert len(seen) == 4 and set(seen) == {precision == "bf16"}           # two steps, with the caption and without


def test_a_text_encoder_that_was_moved(sample, trained, tmp_path):
    sample("a red bird")
    (trained / "clip").rename(trained / "moved")
    try:
        said = refused(sample, "a red bird")
        assert "--text-encoder" in said and str(trained / "clip") in said
        sample("a red bird", "--text-encoder", trained / "moved", "--output", "moved.png")
    finally:
        (trained / "moved").rename(trained / "clip")
    assert (tmp_path / "moved.png").read_bytes() == (tmp_path / "fire.png").read_bytes()


# ---------------------------------------------------------------------------------------------- terminals

def in_ascii(script, *args, cwd, stdout=subprocess.PIPE):
    """Run a script in a terminal that knows ASCII alone -> exit code and what it said on stderr."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, stdout=stdout,
                          stderr=subprocess.PIPE, env={**os.environ, **ASCII}, timeout=300)
    return done.returncode, done.stderr.decode("utf-8", "replace")


def test_chinese_everywhere_in_an_ascii_terminal(tmp_path):
    lay(tmp_path / "\u56fe", [f"{i} \u56fe.png" for i in range(6)], ["\u7ea2\u8272\u7684"] * 6)
    code, said = in_ascii("train_diffusion.py", *small_flags("\u56fe", Path("\u51fa"))[:-2], "--epochs", 1, "--prompts",
                          "\u7ea2\u8272", cwd=tmp_path)
    assert code == 0, said
    with open(tmp_path / "\u51fa" / "run" / "log.csv") as file:
        assert len(file.readlines()) == 2
    assert (tmp_path / "\u51fa" / "run" / "samples" / "epoch_0001.png").is_file()
    checkpoint = "\u51fa/run/checkpoint.pt"
    code, said = in_ascii("sample_diffusion.py", "\u7ea2\u8272", "--steps", 2, "--checkpoint", checkpoint, cwd=tmp_path)
    assert code == 0, said
    # And in a terminal like today's: the checkpoint names the data set as the other one knew it
    done = run("sample_diffusion.py", "\u7ea2\u8272", "--steps", 2, "--checkpoint", checkpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "output" / "sample_00.png") as image:
        assert image.text["prompt"] == "\u7ea2\u8272" and checkpoint in image.text["checkpoint"]


def test_chinese_in_an_ascii_terminal_and_a_pipe_that_nobody_reads(trained, tmp_path):
    """`| head`: every picture is written before anything is printed, and the end is silent."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        code, said = in_ascii("sample_diffusion.py", "\u7ea2\u8272\u7684", "--steps", 2, "--num-images", 2, "--output",
                              "\u9e1f.png", "--checkpoint", trained / "run" / "checkpoint.pt", cwd=tmp_path,
                              stdout=write_end)
    finally:
        os.close(write_end)
    assert code == 0 and "Traceback" not in said and "BrokenPipe" not in said, said
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"\u9e1f{end}.png" for end in ("", "_00", "_01")]


def test_no_standard_output_at_all(monkeypatch, capsys):
    """`>&-`, or a notebook's that can't be reconfigured."""
    for stdout in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stdout)
        sample_diffusion.run(lambda: sample_diffusion.say("a line"))
    assert stdout.getvalue() == "a line\n"
