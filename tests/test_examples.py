"""The demo's data: the drawings say what their captions say, and tiny_clip is a CLIP text encoder."""
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from transformers import CLIPTextModel, CLIPTokenizer

from eyes import BODY_BLOCK, COLOURS, LEFT_OUT, NAMES, OWN, body_colour, look, tail_colour, two_eyes
from make_examples import COUNT, PAIRS, SIZE, caption, draw, make_creature

EXAMPLES = Path(__file__).resolve().parents[1] / 'examples'
CREATURES, TINY_CLIP = EXAMPLES / 'creatures', EXAMPLES / 'tiny_clip'


def folder_size(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture(scope='module')
def rows():
    return [json.loads(line) for line in (CREATURES / 'metadata.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def pictures(rows):
    return [np.asarray(Image.open(CREATURES / row['file_name'])) for row in rows]


@pytest.fixture(scope='module')
def clip():
    return CLIPTokenizer.from_pretrained(TINY_CLIP), CLIPTextModel.from_pretrained(TINY_CLIP).eval()


def colours_in(text):
    """(body, tail) as the caption names them."""
    return re.match(r'an? (\w+) creature (with|that has) ', text)[1], re.search(r'an? (\w+) tail', text)[1]


def test_metadata_names_every_picture_once(rows):
    assert len(rows) == COUNT == len({row['file_name'] for row in rows})
    assert {row['file_name'] for row in rows} == {path.name for path in CREATURES.glob('*.png')}
    assert folder_size(CREATURES) < 1_000_000


def test_pictures_are_small_rgb_on_white(pictures):
    for picture in pictures:
        assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
        assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()            # the corners
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (border == 255).mean() > 0.95                                     # a wing or an ear may touch it


def test_the_body_square_is_nothing_but_body_colour(rows, pictures):
    x, y, half = BODY_BLOCK
    for row, picture in zip(rows, pictures):
        assert (picture[y - half:y + half, x - half:x + half] == COLOURS[colours_in(row['text'])[0]]).all(), row


@pytest.mark.parametrize('size', [64, 32, 128])
def test_eyes_see_what_the_captions_say(rows, pictures, size):
    for row, picture in zip(rows, pictures):
        resized = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BOX))
        assert (body_colour(resized), tail_colour(resized)) == colours_in(row['text']), row


def test_eyes_see_through_noise_and_fading(rows, pictures):
    rng = np.random.default_rng(0)
    for row, picture in zip(rows, pictures):
        noisy = np.clip(picture * 0.9 + 12 + rng.normal(0, 20, picture.shape), 0, 255).astype(np.uint8)
        assert body_colour(noisy) == colours_in(row['text'])[0], row


def resized(pictures, size):
    """As train_diffusion.py does it."""
    return [np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))
            for picture in pictures]


def without_eyes(number, sides):
    """Drawing number so-and-so with the eyes of these sides (-1, 1) painted over."""
    creature, rng = make_creature(0, number), random.Random(make_creature(0, number).seed)
    facing, scale = rng.choice([-1, 1]), rng.uniform(0.92, 1.03)              # in the order in which `draw` asks
    shift_x, shift_y, _, _, head_x = (rng.uniform(*ends) for ends in [(-1.2, 1.2), (-1.2, 1.2), (15, 16.5),
                                                                      (14.5, 15.5), (1, 4)])
    picture = draw(creature)
    for side in sides:
        x = SIZE / 2 + shift_x + scale * facing * (head_x + 2.5 + side * 5)
        y = BODY_BLOCK[1] + shift_y + scale * (20 - BODY_BLOCK[1])
        ImageDraw.Draw(picture).ellipse([x - 5, y - 5.5, x + 5, y + 5.5], fill=COLOURS[creature.body])
    return np.asarray(picture)


@pytest.mark.parametrize('size', [32, 64])
def test_the_drawings_own_figures_are_those_that_eyes_py_names(rows, pictures, size):
    seen = look(resized(pictures, size), [row['text'] for row in rows])
    assert seen == pytest.approx(OWN[size], abs=0.003)


@pytest.mark.parametrize('size', [32, 64])
def test_eyes_that_are_painted_over_or_blurred_away_are_missed(pictures, size):
    seen = lambda some: np.mean([two_eyes(picture) for picture in some])
    some = range(0, COUNT, 4)
    assert seen(resized([without_eyes(i, (-1, 1)) for i in some], size)) == 0
    assert seen(resized([without_eyes(i, (i // 4 % 2 * 2 - 1,)) for i in some], size)) <= 0.1      # one eye
    blurred = [np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(2))) for picture in pictures[::4]]
    assert seen(resized(blurred, size)) == 0


def test_no_tail_is_seen_where_there_is_none():
    assert tail_colour(np.full((64, 64, 3), 255, np.uint8)) is None


def test_left_out_pairs_are_never_drawn_and_every_colour_is_common(rows):
    pairs = [colours_in(row['text']) for row in rows]
    assert ('red', 'blue') in LEFT_OUT and len(LEFT_OUT) == 10
    assert set(pairs) == set(PAIRS) and not LEFT_OUT & set(pairs)
    for seen in (Counter(body for body, _ in pairs), Counter(tail for _, tail in pairs)):
        assert all(seen[name] >= 40 for name in NAMES), seen


def test_drawing_again_gives_the_same_pixels(rows, pictures):
    for i in range(0, COUNT, 8):
        assert (np.asarray(draw(make_creature(0, i))) == pictures[i]).all()
        assert caption(make_creature(0, i), random.Random(f'0/{i}/caption')) == rows[i]['text']


def test_captions_name_what_is_drawn():
    for i in range(500):
        creature = make_creature('captions', i)
        text = caption(creature, random.Random(i))
        assert (creature.body, creature.tail) == colours_in(text)
        assert 'a orange' not in text
        assert 'no wings' not in text or creature.wings is None
        assert 'ears' not in text or '{} {} ears'.format(*creature.ears) in text


def test_imagefolder_reads_the_creatures(tmp_path):
    import datasets
    data = datasets.load_dataset('imagefolder', data_dir=str(CREATURES), split='train', cache_dir=str(tmp_path))
    assert len(data) == COUNT and data[0]['image'].size == (SIZE, SIZE) and 'creature' in data[0]['text']


def test_tiny_clip_is_small_and_loads_whole():
    assert folder_size(TINY_CLIP) <= 2_000_000
    assert {path.name for path in TINY_CLIP.iterdir()} == {
        'config.json', 'merges.txt', 'model.safetensors', 'tokenizer_config.json', 'vocab.json'}
    _, info = CLIPTextModel.from_pretrained(TINY_CLIP, output_loading_info=True)
    assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))


def test_tokenizer_marks_start_and_end_and_takes_any_text(clip):
    tokenizer, model = clip
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 77
    assert tokenizer.eos_token_id == model.config.eos_token_id == len(tokenizer) - 1
    for text in ('', 'A RED creature', 'ein Häuschen, 一只红色的龙 🐉\n\t', '\x00\ufffd', 'x' * 500):
        ids = tokenizer(text, truncation=True)['input_ids']
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert len(ids) <= 77 and tokenizer.eos_token_id not in ids[:-1]       # nothing is an unknown token
    assert tokenizer('A RED Creature')['input_ids'] == tokenizer('a red creature')['input_ids']


@torch.no_grad()
def test_tiny_clip_tells_colours_and_their_places_apart(clip):
    tokenizer, model = clip
    tokens = tokenizer([f'a {body} creature with a {tail} tail' for body in NAMES for tail in NAMES],
                       padding=True, return_tensors='pt')
    assert tokens['input_ids'].shape == (64, 9)                                # a word is one token
    out = model(**tokens)
    assert torch.allclose(out.last_hidden_state[:, -1], out.pooler_output)     # at <|endoftext|>
    pooled = torch.nn.functional.normalize(out.pooler_output, dim=1)
    assert (pooled @ pooled.T - torch.eye(64)).max() < 0.99
