"""
Makes the data of the demo, all of it our own:

  creatures/   400 captioned drawings of small creatures, 64x64, on white: a plain imagefolder
               (pictures, and metadata.jsonl with file_name and text), the pattern for your own pictures
  tiny_clip/   a CLIP text encoder and its tokenizer in transformers' format, trained contrastively
               (CLIP, arXiv 2103.00020) on fresh drawings of the same kind

Both are in the repository already; to make them again (about 5 minutes on a CPU):

    python examples/make_examples.py

The (body, tail) colours in LEFT_OUT are never drawn, neither for the creatures nor for CLIP: a model that
draws them from a prompt has put together what it only saw apart.
"""
import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

COLOURS = {
    'red': (226, 44, 44),     'orange': (250, 138, 22),  'yellow': (252, 226, 60), 'green': (58, 172, 76),
    'blue': (46, 100, 228),   'purple': (146, 62, 190),  'pink': (252, 158, 204),  'brown': (126, 80, 46),
}
LEFT_OUT = {  # (body, tail): no colour is missing more than twice in either place
    ('red', 'blue'), ('orange', 'green'), ('yellow', 'purple'), ('green', 'red'), ('blue', 'yellow'),
    ('blue', 'orange'), ('purple', 'green'), ('pink', 'brown'), ('pink', 'blue'), ('brown', 'pink'),
}
PAIRS = [(body, tail) for body in COLOURS for tail in COLOURS if (body, tail) not in LEFT_OUT]

COUNT = 400              # drawings in creatures/
SIZE = 64                # pixels a side
DETAIL = 3               # drawn at this many times the size, then reduced
INK = (38, 34, 54)       # outlines, pupils, mouth
OUTLINE = 1.1            # its width in pixels
BODY_BLOCK = (32, 40, 7)  # x, y, half side: in every drawing this square is nothing but body colour
TAIL_AREA = (11, 37)     # only a tail is this near (x) to the left or right edge and this far down (y)


# ---------------------------------------------------------------- creatures

@dataclass
class Creature:
    body: str              # colour names
    tail: str
    ears: tuple | None     # (shape, colour)
    wings: str | None
    seed: str              # of its shape: which way it faces, its size, place and proportions


def make_creature(seed, i):
    """Creature number i of a seed. Creatures that follow each other go through all PAIRS evenly."""
    rng = random.Random(f'{seed}/{i}')
    body, tail = random.Random(seed).sample(PAIRS, len(PAIRS))[i % len(PAIRS)]
    ears = (rng.choice(['pointed', 'round']), rng.choice(list(COLOURS))) if rng.random() < 0.7 else None
    wings = rng.choice(list(COLOURS)) if rng.random() < 0.45 else None
    return Creature(body, tail, ears, wings, f'{seed}/{i}/shape')


def caption(creature, rng):
    """One of the ways to describe it: parts in any order, and now and then one is not mentioned."""
    parts = [f'a {creature.tail} tail']
    if creature.ears:
        parts.append('{} {} ears'.format(*creature.ears))
    if creature.wings:
        parts.append(f'{creature.wings} wings')
    if rng.random() < 0.3:
        rng.shuffle(parts)
    elif rng.random() < 0.4:
        parts = parts[:1]                      # only the tail, which every creature has
    if len(parts) == 1 and not creature.wings and rng.random() < 0.2:
        parts.append('no wings')
    listed = ', '.join(parts[:-1]) + ' and ' + parts[-1] if len(parts) > 1 else parts[0]
    verb = 'with' if rng.random() < 0.85 else 'that has'
    return f'a {creature.body} creature {verb} {listed}'.replace('a orange', 'an orange')


def curve(points, radii, count=28):
    """Discs (x, y, rx, ry) along a quadratic Bezier curve; their radius follows one too."""
    weights = [((1 - t) ** 2, 2 * t * (1 - t), t * t) for t in (k / (count - 1) for k in range(count))]
    blend = lambda w, values: sum(a * b for a, b in zip(w, values))
    return [(blend(w, [x for x, _ in points]), blend(w, [y for _, y in points]), blend(w, radii), blend(w, radii))
            for w in weights]


def draw(creature):
    """The drawing, a PIL picture. Every part is a group of discs with one outline around them all."""
    rng = random.Random(creature.seed)
    facing = rng.choice([-1, 1])               # right is 1; x below is 0 in the middle, positive ahead
    scale = rng.uniform(0.92, 1.03)
    shift_x, shift_y = rng.uniform(-1.2, 1.2), rng.uniform(-1.2, 1.2)
    wide, tall = rng.uniform(15, 16.5), rng.uniform(14.5, 15.5)
    head_x, head_y, head_wide, head_tall = rng.uniform(1, 4), 20.5, rng.uniform(12, 14), rng.uniform(10.5, 12)

    picture = Image.new('RGB', (SIZE * DETAIL, SIZE * DETAIL), 'white')
    pen = ImageDraw.Draw(picture)

    def discs(group, colour, grow=0.0):
        for x, y, rx, ry in group:
            x = SIZE / 2 + shift_x + scale * facing * x
            y = BODY_BLOCK[1] + shift_y + scale * (y - BODY_BLOCK[1])
            rx, ry = scale * rx + grow, scale * ry + grow
            pen.ellipse([DETAIL * v for v in (x - rx, y - ry, x + rx, y + ry)], fill=colour)

    def part(group, colour):
        discs(group, INK, OUTLINE)
        discs(group, colour)

    if creature.wings:                         # two wings of three feathers
        spread = rng.uniform(0.93, 1.05)
        for side in (-1, 1):
            feathers = []
            for tip_x, tip_y, bend in [(22, 12, 20), (26, 19, 25), (25, 27, 30)]:
                tip = (side * tip_x * spread, tip_y)
                feathers += curve([(side * 9, 33), (side * 19 * spread, bend), tip], [2, 4.5, 2.6])
            part(feathers, COLOURS[creature.wings])

    if rng.random() < 0.5:                     # a bushy tail that ends in a point, or one with a ball
        path, radii = [(-12, 47), (-24.5, 57), (-25, 36)], [3, 10, 0.6]
        part(curve(path, radii), COLOURS[creature.tail])
    else:
        path, radii = [(-12, 50), (-22.5, 55), (-22.8, 44)], [2.6, 2.6, 2.6]
        part(curve(path, radii) + [(-22.8, 43, 5.5, 5.5)], COLOURS[creature.tail])

    if creature.ears:
        kind, colour = creature.ears
        for side in (-1, 1):
            root = head_x + side * (head_wide - 4.5)
            if kind == 'pointed':
                tip = root + side * rng.uniform(2, 3.5)
                part(curve([(root - side, 15), (root + side, 9), (tip, 4)], [5.2, 3.6, 0.3]), COLOURS[colour])
            else:
                part([(root + side * 1.5, 10.5, 5.4, 5.6)], COLOURS[colour])

    head = (head_x, head_y, head_wide, head_tall)
    feet = [(side * 8.5 + 1.2, 40 + tall - 0.8, 5.4, 3.2) for side in (-1, 1)]
    part([(0, 40, wide, tall), head, *feet], COLOURS[creature.body])

    for side in (-1, 1):                       # eyes that look ahead
        x, y = head_x + 2.5 + side * 5, head_y - 0.5
        part([(x, y, 3.1, 3.7)], 'white')
        discs([(x + 0.7, y + 0.3, 1.9, 2.5)], INK)
        discs([(x + 1.3, y - 0.8, 0.75, 0.75)], 'white')
    discs(curve([(head_x + 0.3, 26.5), (head_x + 2.7, 29), (head_x + 5.1, 26.5)], [0.55] * 3), INK)
    return picture.reduce(DETAIL)


def write_creatures(folder, seed):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'metadata.jsonl', 'w') as metadata:
        for i in range(COUNT):
            creature = make_creature(seed, i)
            draw(creature).save(folder / f'{i:03d}.png', optimize=True)
            row = {'file_name': f'{i:03d}.png', 'text': caption(creature, random.Random(f'{seed}/{i}/caption'))}
            metadata.write(json.dumps(row) + '\n')


# ---------------------------------------------------------------- tiny_clip

def write_tokenizer(folder, captions):
    """CLIP's byte-level BPE, its merges learned from the captions: any other text falls into bytes."""
    start, end = '<|startoftext|>', '<|endoftext|>'
    learner = Tokenizer(models.BPE(end_of_word_suffix='</w>'))
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r'\w+|[^\s\w]+'), 'removed', invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    learner.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=900, end_of_word_suffix='</w>', min_frequency=2, show_progress=False))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())['model']['merges']]

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())      # one for each of the 256 bytes
    tokens = letters + [letter + '</w>' for letter in letters] + [a + b for a, b in merges] + [start, end]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'vocab.json').write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2'] + [f'{a} {b}' for a, b in merges]) + '\n')
    (folder / 'tokenizer_config.json').write_text(json.dumps({
        'tokenizer_class': 'CLIPTokenizer', 'model_max_length': 77, 'do_lower_case': True,
        'bos_token': start, 'eos_token': end, 'unk_token': end, 'pad_token': end}, indent=2) + '\n')
    return CLIPTokenizer.from_pretrained(folder)


def make_clip(tokenizer):
    special = {'bos_token_id': tokenizer.bos_token_id, 'eos_token_id': tokenizer.eos_token_id,
               'pad_token_id': tokenizer.pad_token_id}
    layers = {'hidden_size': 128, 'intermediate_size': 256, 'num_hidden_layers': 2, 'num_attention_heads': 4}
    return CLIPModel(CLIPConfig(
        text_config={**layers, **special, 'vocab_size': len(tokenizer), 'max_position_embeddings': 77},
        vision_config={**layers, 'image_size': SIZE, 'patch_size': 8}, projection_dim=64))


def to_tensor(pictures):
    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1   # (B, 3, 64, 64) in [-1, 1]


def train_clip(clip, tokenizer, seed, steps, batch_size=128, drawings=4000, lr=1e-3):
    creatures = [make_creature(f'{seed}/clip', i) for i in range(drawings)]
    pictures = to_tensor([draw(creature) for creature in creatures])
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        chosen = rng.sample(range(drawings), batch_size)
        text = tokenizer([caption(creatures[i], rng) for i in chosen], padding=True, return_tensors='pt')
        loss = clip(**text, pixel_values=pictures[chosen], return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f'step {step}  contrastive loss {loss.item():.3f}', flush=True)


@torch.no_grad()
def report(clip, tokenizer, seed, count=512, batch_size=64):
    """On new drawings: which of 64 captions belongs to a picture, and which colours its body and tail have."""
    creatures = [make_creature(f'{seed}/report', i) for i in range(count)]
    pictures = to_tensor([draw(creature) for creature in creatures])
    rng = random.Random(seed)

    def guess(pixels, texts):
        text = tokenizer(texts, padding=True, return_tensors='pt')
        return clip(**text, pixel_values=pixels).logits_per_image.argmax(dim=1).tolist()

    found = 0
    for first in range(0, count, batch_size):
        texts = [caption(creature, rng) for creature in creatures[first:first + batch_size]]
        found += sum(texts[k] == texts[i] for i, k in enumerate(guess(pictures[first:first + batch_size], texts)))
    names = list(COLOURS)
    pairs = guess(pictures, [f'a {body} creature with a {tail} tail'.replace('a orange', 'an orange')
                             for body in names for tail in names])
    pair_right = sum((names[k // 8], names[k % 8]) == (creature.body, creature.tail)
                     for k, creature in zip(pairs, creatures))
    print(f'of {count} new drawings: own caption found among {batch_size} {found / count:.1%}, '
          f'body and tail colour of all 64 pairs {pair_right / count:.1%}')


def write_text_model(clip, folder):
    """The text half alone, under the names that transformers.CLIPTextModel of any version reads."""
    weights = {name: tensor for name, tensor in clip.state_dict().items() if name.startswith('text_model.')}
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
    config = clip.config.text_config
    config.architectures = ['CLIPTextModel']
    config.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path(__file__).parent, help='folder to write to')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--clip-steps', type=int, default=800, help='training steps of tiny_clip; 0 leaves it out')
    args = parser.parse_args()

    write_creatures(args.output / 'creatures', args.seed)
    if args.clip_steps:
        torch.manual_seed(args.seed)
        rng = random.Random(args.seed)
        captions = [caption(make_creature(args.seed, i), rng) for i in range(4000)]
        tokenizer = write_tokenizer(args.output / 'tiny_clip', captions)
        clip = make_clip(tokenizer)
        train_clip(clip, tokenizer, args.seed, args.clip_steps)
        report(clip.eval(), tokenizer, args.seed)
        write_text_model(clip, args.output / 'tiny_clip')


if __name__ == '__main__':
    main()
