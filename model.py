"""A small text-to-image diffusion model: CLIP tokens -> UNet with spatial transformers -> DDPM.

    python train_diffusion.py                                    # trains what stands here
    python sample_diffusion.py "a dragon character with tail"    # draws with it

Shapes: B pictures, C channels, H x W pixels, N = H * W positions, L caption tokens, D their width.
Symbols: x_0 a picture in [-1, 1], x_t the same with noise, t = 0 ... T-1 (0 is nearly clean; the papers count from 1),
alpha_bar_t the share of the picture's variance left in x_t; 1 - alpha_bar_t is noise.

Papers, named at each formula by these short names:
    DDPM   Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239
    iDDPM  Nichol and Dhariwal 2021, Improved DDPM, arXiv 2102.09672
    DDIM   Song et al. 2020, Denoising Diffusion Implicit Models, arXiv 2010.02502
    DPM++  Lu et al. 2022, DPM-Solver++, arXiv 2211.01095 (few steps)
    CFG    Ho and Salimans 2022, Classifier-Free Diffusion Guidance, arXiv 2207.12598
    AG     Karras et al. 2024, Guiding a Diffusion Model with a Bad Version of Itself, arXiv 2406.02507 (autoguidance)
    JiT    Li and He 2025, Back to Basics: Let Denoising Generative Models Denoise, arXiv 2511.13720 (x_0-prediction)
    LDM    Rombach et al. 2021, Latent Diffusion, arXiv 2112.10752 (spatial transformer)
"""
import argparse
import hashlib
import io
import logging
import math
import os
import sys
from contextlib import contextmanager, nullcontext, suppress

import torch
import torch.nn.functional as F
from torch import nn

STRIDE = 8     # pixels a side that one position of the lowest level covers
GROUPS = 16    # of channels, each normalised by itself (GroupNorm)
HEAD_DIM = 32  # channels of one attention head
DETAIL = 0.05  # share of T: pictures with less noise are not guided; it would only take time (arXiv 2404.07724)


def timestep_embedding(t, dim):
    """Sines and cosines of t at geometrically spaced frequencies: (B,) -> (B, dim). DDPM, appendix B."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)  # 10,000^(-i / half)
    angles = t[:, None].float() * frequencies[None, :]                                       # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)                                   # (B, dim)


class Attention(nn.Module):
    """Multi-head attention of x (B, N, dim) to `context` (B, L, context_dim), or to x itself if none is given.

    In cross-attention, keys and values come from the caption. mask (B, L): True for the tokens to look at.
    """

    def __init__(self, dim, context_dim):
        super().__init__()
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context=None, mask=None):
        B, N, C = x.shape
        context = x if context is None else context                     # (B, L, context_dim)
        q, k, v = (tokens.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)  # (B, heads, N or L, HEAD_DIM)
                   for tokens in (self.to_q(x), self.to_k(context), self.to_v(context)))
        # softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, arXiv 1706.03762, Eq. 1). At the 64 positions here, torch's
        # fused version is no faster, and on Apple's GPU it has given wrong results.
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)          # (B, heads, N, L)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)  # padding is not looked at
        out = scores.softmax(dim=-1) @ v                                # (B, heads, N, HEAD_DIM)
        return self.to_out(out.transpose(1, 2).reshape(B, N, C))        # (B, N, C)


class TransformerBlock(nn.Module):
    """Self-attention between positions, cross-attention to the caption, feed-forward; each added to its input."""

    def __init__(self, dim, context_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, context, mask):
        x = x + self.self_attention(self.norm1(x))                  # (B, N, C)
        x = x + self.cross_attention(self.norm2(x), context, mask)  # (B, N, C)
        return x + self.feed_forward(self.norm3(x))                 # (B, N, C)


class SpatialTransformer(nn.Module):
    """A TransformerBlock over the positions of a feature map, with a residual around it. LDM, section 3.3."""

    def __init__(self, channels, context_dim):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.proj_in = nn.Linear(channels, channels)
        self.block = TransformerBlock(channels, context_dim)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x, context, mask):
        B, C, H, W = x.shape
        # A copy, since Linear has gone wrong on Apple's GPU if its input was a view with other strides
        tokens = self.norm(x).flatten(2).transpose(1, 2).contiguous()            # (B, N, C)
        tokens = self.proj_out(self.block(self.proj_in(tokens), context, mask))  # (B, N, C)
        return x + tokens.transpose(1, 2).reshape(B, C, H, W)                    # (B, C, H, W)


class ResnetBlock(nn.Module):
    """Two convolutions with a residual; the time scales and shifts the features between them (iDDPM, appendix A).

    The residual starts from norm1(x), not x: otherwise the convolutions of all levels multiply without bound.
    """

    def __init__(self, in_channels, out_channels, time_dim):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(GROUPS, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, time):
        x = self.norm1(x)                                                 # (B, in_channels, H, W)
        h = self.conv1(F.silu(x))                                         # (B, out_channels, H, W)
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)  # (B, out_channels, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))                       # (B, out_channels, H, W)


class DownBlock(nn.Module):
    """A ResnetBlock, and a SpatialTransformer if `context_dim`, the width of the caption's states, is given."""

    def __init__(self, in_channels, out_channels, time_dim, context_dim=None):
        super().__init__()
        self.resnet = ResnetBlock(in_channels, out_channels, time_dim)
        self.transformer = SpatialTransformer(out_channels, context_dim) if context_dim else None

    def forward(self, x, time, context, mask):
        x = self.resnet(x, time)                                            # (B, out_channels, H, W)
        return self.transformer(x, context, mask) if self.transformer else x  # (B, out_channels, H, W)


class MiddleBlock(nn.Module):
    """The deepest features: ResnetBlock, SpatialTransformer, ResnetBlock."""

    def __init__(self, channels, time_dim, context_dim):
        super().__init__()
        self.resnet1 = ResnetBlock(channels, channels, time_dim)
        self.transformer = SpatialTransformer(channels, context_dim)
        self.resnet2 = ResnetBlock(channels, channels, time_dim)

    def forward(self, x, time, context, mask):
        x = self.transformer(self.resnet1(x, time), context, mask)  # (B, C, H, W)
        return self.resnet2(x, time)                                # (B, C, H, W)


class UpBlock(DownBlock):
    """The same as a DownBlock, over the features from below and, beside them, the DownBlock's (skip connection)."""

    def forward(self, x, skip, time, context, mask):
        return super().forward(torch.cat([x, skip], dim=1), time, context, mask)


class UNet(nn.Module):
    """x_0 = unet(x_t, t, context, mask): the clean picture that is hidden in a noisy one, given its caption.

    x_t (B, 3, H, W), sides a multiple of STRIDE, else ValueError; t (B,) integers 0 ... T-1; context (B, L, D) the
    caption's token states; mask (B, L) True where a token is real, at least one per row. Returns x_0 (B, 3, H, W).
    Drawings fill a small part of the space of pictures, noise all of it: a small network answers with them best (JiT).
    channels: c, a multiple of GROUPS, width of the first level (of the others 2c, 3c, 4c); context_dim: D, the text
    encoder's width; image_size: that of training, kept for the sampler.
    """

    def __init__(self, image_size=64, channels=64, context_dim=512):
        super().__init__()
        self.config = dict(image_size=image_size, channels=channels, context_dim=context_dim)  # to rebuild it
        c, time, text = channels, 4 * channels, context_dim
        self.time_mlp = nn.Sequential(nn.Linear(c, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        # Most of a token's state is the same in all captions: train_diffusion.py puts the mean and standard deviation
        # over its captions here, so that what is left after them is what the captions say.
        self.register_buffer("text_mean", torch.zeros(text))          # (D,)
        self.register_buffer("text_std", torch.ones(text))            # (D,)

        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.down1 = DownBlock(c, c, time)                            # every pixel: edges, and what is noise
        self.downsample1 = nn.Conv2d(c, 2 * c, 2, stride=2)
        self.down2 = DownBlock(2 * c, 2 * c, time)                    # squares of 2x2 pixels: eyes, mouths, claws
        self.downsample2 = nn.Conv2d(2 * c, 3 * c, 2, stride=2)
        self.down3 = DownBlock(3 * c, 3 * c, time)                    # squares of 4x4: heads, limbs
        self.downsample3 = nn.Conv2d(3 * c, 4 * c, 2, stride=2)
        self.down4 = DownBlock(4 * c, 4 * c, time, text)              # squares of 8x8: the whole, and the caption;
        self.middle = MiddleBlock(4 * c, time, text)                  # further up, attention would cost most
        self.up4 = UpBlock(8 * c, 4 * c, time, text)
        self.upsample3 = nn.Sequential(nn.Conv2d(4 * c, 3 * c * 4, 1), nn.PixelShuffle(2))  # each position fills its
        self.up3 = UpBlock(6 * c, 3 * c, time)                                              # own 2x2 below
        self.upsample2 = nn.Sequential(nn.Conv2d(3 * c, 2 * c * 4, 1), nn.PixelShuffle(2))
        self.up2 = UpBlock(4 * c, 2 * c, time)
        self.upsample1 = nn.Sequential(nn.Conv2d(2 * c, c * 4, 1), nn.PixelShuffle(2))
        self.up1 = UpBlock(2 * c, c, time)
        self.norm_out = nn.GroupNorm(GROUPS, c)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, x_t, t, context, mask):
        H, W = x_t.shape[2:]
        if H % STRIDE or W % STRIDE:
            raise ValueError(f"picture of {W}x{H} pixels: both sides must be a multiple of {STRIDE}")
        time = self.time_mlp(timestep_embedding(t, self.config["channels"]))  # (B, 4c)
        context = (context - self.text_mean) / self.text_std                  # (B, L, D)

        skip1 = self.down1(self.conv_in(x_t), time, context, mask)            # (B, c, 64, 64) for 64x64 pixels
        skip2 = self.down2(self.downsample1(skip1), time, context, mask)      # (B, 2c, 32, 32)
        skip3 = self.down3(self.downsample2(skip2), time, context, mask)      # (B, 3c, 16, 16)
        skip4 = self.down4(self.downsample3(skip3), time, context, mask)      # (B, 4c, 8, 8)
        x = self.middle(skip4, time, context, mask)                           # (B, 4c, 8, 8)
        x = self.up4(x, skip4, time, context, mask)                           # (B, 4c, 8, 8)
        x = self.up3(self.upsample3(x), skip3, time, context, mask)           # (B, 3c, 16, 16)
        x = self.up2(self.upsample2(x), skip2, time, context, mask)           # (B, 2c, 32, 32)
        x = self.up1(self.upsample1(x), skip1, time, context, mask)           # (B, c, 64, 64)
        return self.conv_out(F.silu(self.norm_out(x))).float()                # (B, 3, 64, 64)


class TextEncoder(nn.Module):
    """The frozen text half of CLIP: captions -> the states of their tokens.

    name: a Hugging Face model name or a local folder. Raises UserError if it can't be had, or is no CLIP.
    """

    def __init__(self, name):
        super().__init__()
        import transformers                          # takes seconds to import: only where captions are encoded
        transformers.logging.set_verbosity_error()   # no list of CLIP's picture weights, which stay unused
        transformers.logging.disable_progress_bar()
        with user_errors(f"--text-encoder: {name}", name):
            self.tokenizer = transformers.CLIPTokenizer.from_pretrained(name)
            kind = transformers.AutoConfig.from_pretrained(name).model_type
            self.clip, found = transformers.CLIPTextModel.from_pretrained(name, output_loading_info=True)
        self.clip.eval().requires_grad_(False)
        self.dim, words = self.clip.config.hidden_size, len(self.tokenizer)                    # D
        wrong = [*found["missing_keys"], *found["mismatched_keys"]]
        whole = [word.removesuffix("</w>") for word in self.tokenizer.get_vocab() if word.endswith("</w>")]
        longest = max((word for word in whole if word.isascii() and word.isalpha()), key=len, default="")
        tokens = len(self.tokenizer.tokenize(longest))                            # 1, unless merges.txt is damaged
        if wrong or words != self.clip.config.vocab_size or kind not in ("clip", "clip_text_model") or tokens != 1:
            # transformers itself would go on, with random weights or a vocabulary of a few signs
            raise UserError(f"--text-encoder: {name} is no CLIP text encoder with its tokenizer: model type {kind}, "
                            f"{len(wrong)} weights missing, {words} words for {self.clip.config.vocab_size} vectors, "
                            f"its longest word {longest!r} is {tokens} tokens")
        self.max_length = min(self.tokenizer.model_max_length, self.clip.config.max_position_embeddings)
        self.warned = False

    @torch.no_grad()
    def forward(self, captions):
        """List of B strings -> states (B, L, D), float32, and mask (B, L), True for real tokens.

        L is the longest caption's length, start and end tokens included, so no row is ever without a token.
        Captions over 77 tokens are cut, with one warning.
        """
        # One token more than is kept shows which captions are too long
        ids = self.tokenizer(captions, truncation=True, max_length=self.max_length + 1)["input_ids"]
        long = [caption for caption, tokens in zip(captions, ids) if len(tokens) > self.max_length]
        if long and not self.warned:
            self.warned = True
            logging.warning("captions over %d tokens are cut, such as %.60r ...", self.max_length, long[0])
        tokens = self.tokenizer(captions, truncation=True, max_length=self.max_length, padding=True,
                                return_tensors="pt")
        states = self.clip(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        return states.float(), tokens["attention_mask"].bool()


def first_tokens(mask, share):
    """mask (B, L) -> the same, True for that share of a caption's tokens alone: the first ones, at least one."""
    kept = (share * mask.sum(dim=1, keepdim=True)).ceil().clamp(min=1)          # (B, 1)
    return mask & (torch.arange(mask.shape[1], device=mask.device) < kept)      # (B, L)


class NoiseScheduler(nn.Module):
    """The forward process q, its posterior, and the sampler that runs the process backwards.

    Tables are computed in float64 on the CPU. Those that batches need are kept in float32; `.to(device)` moves them.
    """

    def __init__(self, num_timesteps=1000):
        super().__init__()
        self.num_timesteps = T = num_timesteps
        # The cosine schedule, iDDPM Eq. 17, and its betas capped at 0.999 so that no step erases everything
        u = torch.arange(T + 1, dtype=torch.float64) / T                        # (T + 1,) from 0 to 1
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)                            # beta_t
        alpha_bar = torch.cumprod(1 - beta, dim=0)                              # DDPM, above Eq. 4
        self.alpha_bars = [*alpha_bar.tolist(), 1.0]                            # float64; [-1] is the clean picture
        alpha_bar = alpha_bar.view(T, 1, 1, 1)                                  # so that [t] is (B, 1, 1, 1)
        # q(x_t | x_0) = N(signal_scale x_0, noise_scale^2 I), DDPM Eq. 4. Not saved: num_timesteps gives them again
        self.register_buffer("signal_scale", alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("noise_scale", (1 - alpha_bar).sqrt().float(), persistent=False)

    def add_noise(self, x_0, noise, t):
        """x_t, the picture after t steps of noise at once (DDPM Eq. 4). x_0, noise (B, 3, H, W); t (B,)."""
        return self.signal_scale[t] * x_0 + self.noise_scale[t] * noise

    def step(self, x_0, x_t, t, s, z):
        """x_s, drawn from q(x_s | x_t, x_0). t > s are ints, s = -1 the clean picture; z ~ N(0, I) like x_t.

        With s = t - 1 this is DDPM Eq. 7 in Algorithm 2; further back, the steps between are taken as one (DDIM Eq. 12
        and 16 with eta 1).
        """
        alpha_bar_t, alpha_bar_s = self.alpha_bars[t], self.alpha_bars[s]
        beta = 1 - alpha_bar_t / alpha_bar_s                                    # of all the steps from s to t
        mean = (math.sqrt(alpha_bar_s) * beta / (1 - alpha_bar_t) * x_0
                + math.sqrt(1 - beta) * (1 - alpha_bar_s) / (1 - alpha_bar_t) * x_t)
        return mean + math.sqrt(beta * (1 - alpha_bar_s) / (1 - alpha_bar_t)) * z

    def extrapolate(self, x_0, x_0_prev, t_prev, t, s):
        """The estimate of x_0 halfway from t to s, if it goes on changing as it did from t_prev to t.

        It is D in DPM++ Algorithm 2. A `step` with it is one of SDE-DPM-Solver++(2M): second order in place of first.
        """
        lambda_prev, lambda_t, lambda_s = (math.log(self.alpha_bars[i] / (1 - self.alpha_bars[i])) / 2
                                           for i in (t_prev, t, s))             # log of signal over noise
        return x_0 + (lambda_s - lambda_t) / (2 * (lambda_t - lambda_prev)) * (x_0 - x_0_prev)

    def timesteps(self, steps):
        """`steps` different times from T-1, pure noise, down towards 0: list of ints.

        They lie on a parabola (DDIM, appendix D.2): close together at the end, where the fine detail is drawn.
        """
        left = range(steps, 0, -1)                                              # steps still to be done, this one too
        return [max(round(self.num_timesteps * (n / steps) ** 2), n) - 1 for n in left]

    @torch.no_grad()
    def sample(self, unet, guide, x_t, text, no_text, generators, steps, guidance_scale, caption_cut, on_step=None):
        """Run the process backwards: x_t, pure noise (B, 3, H, W) -> pictures (B, 3, H, W) in [-1, 1].

        guide: the network's averaged weights as they were early in training.
        text, no_text: (states (B, L, D), mask (B, L)) of the captions and of the empty caption.
        generators: a CPU random generator per picture, so that a seed means the same on every device.
        steps: T (1,000) is DDPM, fewer take several of its steps at once. guidance_scale: 1 is plain conditional
        sampling, above 1 goes further from `guide`, which is asked without the caption, towards `unet`, with it.
        caption_cut: that of training; if captions were cut, guided pictures begin with their first words.
        on_step: called with the x_t of each step.
        """
        T, x_0_prev, t_prev, times = self.num_timesteps, None, None, self.timesteps(steps)
        for t, s in zip(times, times[1:] + [-1]):
            # 1. The network's estimate of the clean picture
            t_batch = torch.full((len(x_t),), t, device=x_t.device)             # (B,)
            if guidance_scale == 1 or t < DETAIL * T:
                x_0 = unet(x_t, t_batch, *text)
            else:
                # A new caption, read whole, would lay out parts of several drawings: it comes word by word, and is
                # whole from t = 2/3 T on. Guidance leads away from no caption (CFG Eq. 6, w = scale - 1) and from the
                # network as it was early on (AG, where both have the caption)
                states, mask = text
                mask = first_tokens(mask, 3 * (1 - t / T)) if caption_cut else mask
                x_early = guide(x_t, t_batch, *no_text)
                x_0 = x_early + guidance_scale * (unet(x_t, t_batch, states, mask) - x_early)
            x_0 = x_0.clamp(-1, 1)                                              # so that no error piles up

            # 2. In long steps, extrapolate; the first has no estimate before it, the last ends at its own
            between = steps < T and t_prev is not None and s >= 0
            x_0_mid = self.extrapolate(x_0, x_0_prev, t_prev, t, s) if between else x_0
            x_0_prev, t_prev = x_0, t

            # 3. Less noise: back to the time s
            z = torch.stack([torch.randn(x_t.shape[1:], generator=g) for g in generators]).to(x_t.device)
            x_t = self.step(x_0_mid, x_t, t, s, z)
            if on_step:
                on_step(x_t)
        return x_t


# ---------------------------------------------------------------------------------------------- what both scripts need

class UserError(Exception):
    """A user's mistake: `run` prints it as one line. Every other exception is a bug and shows its traceback."""


def run(main):
    """Call a script's main(). A UserError ends it with one line and exit code 1, a closed pipe (| head) in silence."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")     # Chinese on a terminal that knows ASCII alone
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def number(kind, low, high, unit=None):
    """An argparse type: a number of that kind from low to high, and a multiple of `unit` if that is given."""
    def number(text):
        """The number that `text` names. argparse takes this function's name into 'invalid number value'."""
        if not low <= kind(text) <= high:                      # nan is not either
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        if unit and kind(text) % unit:
            raise argparse.ArgumentTypeError(f"{text} is not a multiple of {unit}")
        return kind(text)
    return number


def prompt(text):
    """An argparse type: a text that is not empty, also where the terminal knows ASCII alone (LC_ALL=C)."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a prompt is empty")
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def first_line(error):
    """What an exception's innermost cause says, in one line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return str(error).strip().partition("\n")[0] or type(error).__name__


def ask_hub(*names):
    """If a name is no local path and the hub is silent, have its libraries use their cache: they try for minutes."""
    from huggingface_hub import constants, utils
    try:
        if not all(map(os.path.exists, names)):
            utils.get_session().get(constants.ENDPOINT, timeout=10)
    except Exception:                                     # requests' or httpx's, by the library's version
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True


@contextmanager
def user_errors(what, name=None):
    """Whatever fails inside becomes a UserError: `what`, and why. name: of something that the hub may have to give."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library's own, the network's or the disk's: what is innermost says most
        why = first_line(error)
        if name and not os.path.exists(name) and os.environ.get("HF_HUB_OFFLINE") == "1":
            hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            why = (f"no local folder, not downloaded before, and {hub} does not answer. Set HF_ENDPOINT to a mirror, "
                   "give a local folder, or train on the built-in drawings: train_diffusion.py --demo")
        raise UserError(f"{what}: {why}") from error


def check_writable(flag, folder):
    """Raises UserError, before any work is done, if `folder` can neither be written to nor be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{flag} {folder}: {there} is no folder that can be written to")


def pick_device(name):
    """'auto', 'cuda', 'mps' or 'cpu' -> torch.device. Raises UserError for one that this machine does not have."""
    found = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    there = [device for device in found if found[device]]
    if name not in ("auto", *there):
        raise UserError(f"--device {name}: this machine has {', '.join(there)}")
    device = torch.device(there[0] if name == "auto" else name)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))    # torchrun starts one process per GPU
    return device


def autocast(device, precision="auto"):
    """What the forward pass runs under: nothing for fp32; for bf16 torch.autocast. auto: bf16 if in hardware."""
    cpu = getattr(torch.cpu, "get_capabilities", dict)()               # torch before 2.10 can't be asked: fp32
    bf16 = dict(cuda=torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
                cpu=cpu.get("avx512_bf16") or cpu.get("amx_bf16"), mps=False)  # slower there (karpathy/nanochat#685)
    wanted = precision == "bf16" or precision == "auto" and bf16[device.type]
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()


def generator_for(*key):
    """A CPU random generator that follows from its key alone, so that no draw depends on what was drawn before."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big"))


def to_uint8(x):
    """Pictures in [-1, 1] -> bytes 0 ... 255, clamped first: a uint8 cast alone would turn -1.04 into 251."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def write_atomically(path, save):
    """Write what save(file) writes beside `path`, and move it into place: never half a file. Raises UserError."""
    content, beside = io.BytesIO(), path.with_name(f"{path.name}.{os.getpid()}.tmp")
    content.name = path.name                              # Pillow chooses the format by it
    save(content)
    with user_errors(f"{path} could not be written"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content.getbuffer())
            os.replace(beside, path)
        finally:
            with suppress(OSError):                       # gone already, if all went well
                beside.unlink()
