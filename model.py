"""A small text-to-image diffusion model: CLIP tokens -> UNet with spatial transformers -> DDPM.

    python train_diffusion.py      # trains what stands here
    python sample_diffusion.py     # draws with it

Shapes: B pictures, C channels, H x W pixels, N = H * W positions, L caption tokens, D their width.
Symbols: x_0 a picture in [-1, 1], x_t the same with noise, t = 0 ... T-1 (0 is nearly clean; the papers count from 1),
alpha_bar_t the share of the picture's variance left in x_t; 1 - alpha_bar_t is noise.

Papers, named at each formula by these short names:
    DDPM   Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239
    iDDPM  Nichol and Dhariwal 2021, Improved DDPM, arXiv 2102.09672
    DDIM   Song et al. 2020, Denoising Diffusion Implicit Models, arXiv 2010.02502
    DPM++  Lu et al. 2022, DPM-Solver++, arXiv 2211.01095 (few steps)
    CFG    Ho and Salimans 2022, Classifier-Free Diffusion Guidance, arXiv 2207.12598
    PD     Salimans and Ho 2022, Progressive Distillation, arXiv 2202.00512 (v-prediction)
    LDM    Rombach et al. 2021, Latent Diffusion, arXiv 2112.10752 (spatial transformer)
"""
import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class UNetConfig:
    """All that is needed to rebuild the network; the checkpoint stores it."""
    image_size: int = 64                    # pixels a side, as trained
    channels: int = 96                      # width of the first level
    channel_mults: tuple = (1, 2, 4)        # width of each level, in units of `channels`
    attention: tuple = (False, True, True)  # spatial transformers at 16x16 and 8x8: at 32x32 they cost too much
    blocks: int = 1                         # ResnetBlocks per level, on the way down and on the way up
    patch: int = 2                          # pixels folded into channels: 64x64x3 is computed as 32x32x12
    head_dim: int = 64                      # channels of one attention head
    context_dim: int = 512                  # D, the text encoder's width

    @property
    def stride(self):
        """Pixels that one position of the deepest level covers: picture sides must be a multiple of it."""
        return self.patch * 2 ** (len(self.channel_mults) - 1)


def timestep_embedding(t, dim):
    """Sines and cosines of t at geometrically spaced frequencies: (B,) -> (B, dim). DDPM, appendix B."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)  # 1 ... 1/10,000
    angles = t[:, None].float() * frequencies[None, :]                                       # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)                                   # (B, dim)


def group_norm(channels):
    """GroupNorm with 32 groups, or as near to it as the channels divide."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


class Attention(nn.Module):
    """Multi-head attention of x to `context`, or of x to itself where no context is given."""

    def __init__(self, dim, context_dim, head_dim):
        super().__init__()
        self.heads = dim // head_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)  # the one place where a caption enters this block:
        self.to_v = nn.Linear(context_dim, dim, bias=False)  # learned projections, the same for every picture
        self.to_out = nn.Linear(dim, dim)

    def split_heads(self, x):
        """(B, N, C) -> (B, heads, N, head_dim)."""
        B, N, C = x.shape
        return x.view(B, N, self.heads, C // self.heads).transpose(1, 2)  # (B, heads, N, head_dim)

    def forward(self, x, context=None, mask=None):
        B, N, C = x.shape
        context = x if context is None else context                     # (B, L, D)
        q = self.split_heads(self.to_q(x))                              # (B, heads, N, head_dim)
        k = self.split_heads(self.to_k(context))                        # (B, heads, L, head_dim)
        v = self.split_heads(self.to_v(context))                        # (B, heads, L, head_dim)
        # softmax(q k^T / sqrt(head_dim)) v (Vaswani et al. 2017, arXiv 1706.03762, Eq. 1). At the few hundred positions
        # here, torch's fused version is no faster, and on Apple's GPU it is known to give wrong results.
        scores = q @ k.transpose(-1, -2) / math.sqrt(C // self.heads)   # (B, heads, N, L)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)  # padding is not looked at
        out = scores.softmax(dim=-1) @ v                                # (B, heads, N, head_dim)
        return self.to_out(out.transpose(1, 2).reshape(B, N, C))        # (B, N, C)


class TransformerBlock(nn.Module):
    """Self-attention between positions, cross-attention to the caption, feed-forward; each added to its input."""

    def __init__(self, dim, context_dim, head_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, dim, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, context_dim, head_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, context, mask):
        x = x + self.self_attention(self.norm1(x))                  # (B, N, C)
        x = x + self.cross_attention(self.norm2(x), context, mask)  # (B, N, C)
        return x + self.feed_forward(self.norm3(x))                 # (B, N, C)


class SpatialTransformer(nn.Module):
    """A TransformerBlock over the positions of a feature map, with a residual around it. LDM, section 3.3."""

    def __init__(self, channels, context_dim, head_dim):
        super().__init__()
        self.norm = group_norm(channels)
        self.proj_in = nn.Linear(channels, channels)
        self.block = TransformerBlock(channels, context_dim, head_dim)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x, context, mask):
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)                        # (B, N, C)
        tokens = self.proj_out(self.block(self.proj_in(tokens), context, mask))  # (B, N, C)
        return x + tokens.transpose(1, 2).reshape(B, C, H, W)                   # (B, C, H, W)


class ResnetBlock(nn.Module):
    """Two convolutions with a residual; the time scales and shifts the features between them (iDDPM, appendix A).

    The residual starts from the normalised features. Started from x itself, as is more usual, the skip, down- and
    upsampling convolutions of all levels multiply into one long product, which can grow without a limit.
    """

    def __init__(self, in_channels, out_channels, time_dim):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, time):
        x = self.norm1(x)                                                # (B, in_channels, H, W)
        h = self.conv1(F.silu(x))                                        # (B, out_channels, H, W)
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)  # (B, out_channels, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))                      # (B, out_channels, H, W)


class Stage(nn.Module):
    """A ResnetBlock, followed by a SpatialTransformer where the level has attention."""

    def __init__(self, in_channels, out_channels, time_dim, attention, config):
        super().__init__()
        self.resnet = ResnetBlock(in_channels, out_channels, time_dim)
        self.transformer = (SpatialTransformer(out_channels, config.context_dim, config.head_dim)
                            if attention else None)

    def forward(self, x, time, context, mask):
        x = self.resnet(x, time)
        return x if self.transformer is None else self.transformer(x, context, mask)


class DownBlock(nn.Module):
    """The stages of one level; then, except at the last level, half the resolution."""

    def __init__(self, in_channels, out_channels, time_dim, attention, last, config):
        super().__init__()
        widths = [in_channels] + [out_channels] * config.blocks
        self.stages = nn.ModuleList(Stage(a, b, time_dim, attention, config) for a, b in zip(widths, widths[1:]))
        self.downsample = None if last else nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x, time, context, mask):
        skips = []                                # one per stage, for the UpBlock of the same level
        for stage in self.stages:
            x = stage(x, time, context, mask)
            skips.append(x)
        return (x if self.downsample is None else self.downsample(x)), skips


class MiddleBlock(nn.Module):
    """The deepest features: a stage with attention and one more ResnetBlock."""

    def __init__(self, channels, time_dim, config):
        super().__init__()
        self.stage = Stage(channels, channels, time_dim, True, config)
        self.resnet = ResnetBlock(channels, channels, time_dim)

    def forward(self, x, time, context, mask):
        return self.resnet(self.stage(x, time, context, mask), time)


class UpBlock(nn.Module):
    """Stages that each take in one skip of the DownBlock; then, except at the first level, twice the resolution."""

    def __init__(self, in_channels, skip_channels, time_dim, attention, first, config):
        super().__init__()
        widths = [in_channels] + [skip_channels] * config.blocks
        self.stages = nn.ModuleList(Stage(a + skip_channels, b, time_dim, attention, config)
                                    for a, b in zip(widths, widths[1:]))
        self.upsample = None if first else nn.Conv2d(skip_channels, skip_channels, 3, padding=1)

    def forward(self, x, skips, time, context, mask):
        for stage in self.stages:
            x = stage(torch.cat([x, skips.pop()], dim=1), time, context, mask)
        if self.upsample is None:
            return x
        return self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """v = unet(x_t, t, context, mask): what to take out of a noisy picture, given its caption.

    x_t (B, 3, H, W) noisy pictures, sides a multiple of config.stride; t (B,) integers 0 ... T-1;
    context (B, L, D) the caption's token states; mask (B, L) True where a token is real, at least one a row.
    Returns v (B, 3, H, W) as NoiseScheduler.velocity defines it. Raises ValueError for sides that do not divide.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths = [config.channels * mult for mult in config.channel_mults]
        time_dim = 4 * config.channels
        levels = list(zip([widths[0], *widths], widths, config.attention))   # (in, out, attention) per level

        self.time_mlp = nn.Sequential(nn.Linear(config.channels, time_dim), nn.SiLU(),
                                      nn.Linear(time_dim, time_dim), nn.SiLU())
        # Most of a token's state is the same in all captions: train_diffusion.py puts the mean and standard deviation
        # over its captions here, so that what is left after them is what the captions say.
        self.register_buffer("text_mean", torch.zeros(config.context_dim))   # (D,)
        self.register_buffer("text_std", torch.ones(config.context_dim))     # (D,)
        self.conv_in = nn.Conv2d(3 * config.patch ** 2, widths[0], 3, padding=1)
        self.down = nn.ModuleList(DownBlock(a, b, time_dim, attention, i == len(levels) - 1, config)
                                  for i, (a, b, attention) in enumerate(levels))
        self.middle = MiddleBlock(widths[-1], time_dim, config)
        self.up = nn.ModuleList(UpBlock(widths[min(i + 1, len(levels) - 1)], b, time_dim, attention, i == 0, config)
                                for i, (_, b, attention) in reversed(list(enumerate(levels))))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3 * config.patch ** 2, 3, padding=1)

    def forward(self, x_t, t, context, mask):
        B, C, H, W = x_t.shape
        if H % self.config.stride or W % self.config.stride:
            raise ValueError(f"picture of {W}x{H} pixels: both sides must be a multiple of {self.config.stride}")
        time = self.time_mlp(timestep_embedding(t, self.config.channels))  # (B, time_dim)
        context = (context - self.text_mean) / self.text_std               # (B, L, D)

        x = self.conv_in(F.pixel_unshuffle(x_t, self.config.patch))        # 64x64 pixels -> 32x32 positions
        skips = []
        for down in self.down:                                             # 32x32 -> 16x16 -> 8x8
            x, level_skips = down(x, time, context, mask)
            skips.append(level_skips)
        x = self.middle(x, time, context, mask)                            # 8x8
        for up in self.up:                                                 # 8x8 -> 16x16 -> 32x32
            x = up(x, skips.pop(), time, context, mask)
        v = self.conv_out(F.silu(self.norm_out(x)))                        # (B, 12, 32, 32)
        return F.pixel_shuffle(v.float(), self.config.patch)               # 32x32 positions -> 64x64 pixels


class TextEncoder(nn.Module):
    """The frozen text half of CLIP: captions -> the states of their tokens.

    name: a Hugging Face model name or a local folder. Raises OSError where it can be neither found nor fetched.
    """

    def __init__(self, name):
        super().__init__()
        import transformers  # takes seconds to import: only where captions are encoded
        transformers.logging.set_verbosity_error()        # no list of CLIP's picture weights, which stay unused
        transformers.logging.disable_progress_bar()
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(name)
        self.clip = transformers.CLIPTextModel.from_pretrained(name).eval().requires_grad_(False)
        self.dim = self.clip.config.hidden_size                                                # D
        self.max_length = min(self.tokenizer.model_max_length, self.clip.config.max_position_embeddings)
        self.warned = False

    @torch.no_grad()
    def forward(self, captions):
        """List of B strings -> states (B, L, D), float32, and mask (B, L), True for real tokens.

        L is the longest caption's length, start and end tokens included, so no row is ever without a token.
        Captions over 77 tokens are cut, with one warning.
        """
        ids = self.tokenizer(captions, truncation=True, max_length=self.max_length + 1)["input_ids"]
        if max(map(len, ids)) > self.max_length and not self.warned:
            self.warned = True
            longest = captions[max(range(len(ids)), key=lambda i: len(ids[i]))]
            logging.warning("captions over %d tokens are cut, such as %.60r ...", self.max_length, longest)
        tokens = self.tokenizer(captions, truncation=True, max_length=self.max_length, padding=True,
                                return_tensors="pt")
        states = self.clip(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        return states.float(), tokens["attention_mask"].bool()


def per_picture(values):
    """(B,) -> (B, 1, 1, 1), so that one number a picture multiplies all its pixels."""
    return values[:, None, None, None]


class NoiseScheduler(nn.Module):
    """The forward process q, its posterior, and the sampler that runs the process backwards.

    All tables are (T,), computed in float64 and kept in float32; `.to(device)` moves them.
    """

    def __init__(self, num_timesteps=1000):
        super().__init__()
        self.num_timesteps = T = num_timesteps
        # The cosine schedule, iDDPM Eq. 17, and its betas capped at 0.999 so that no step erases everything.
        u = torch.arange(T + 1, dtype=torch.float64) / T                        # (T + 1,) from 0 to 1
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)                            # beta_t
        alpha_bar = torch.cumprod(1 - beta, dim=0)                              # DDPM, above Eq. 4
        self.alpha_bars = alpha_bar.tolist()                                    # in float64, for the posterior

        def table(name, values):
            """Keep values (T,) as self.name; not in checkpoints, since num_timesteps gives them again."""
            self.register_buffer(name, values.float(), persistent=False)

        # q(x_t | x_0) = N(signal x_0, noise^2 I), DDPM Eq. 4
        table("signal", alpha_bar.sqrt())
        table("noise", (1 - alpha_bar).sqrt())

    def add_noise(self, x_0, noise, t):
        """x_t, the picture after t steps of noise at once (DDPM Eq. 4). x_0, noise (B, 3, H, W); t (B,)."""
        return per_picture(self.signal[t]) * x_0 + per_picture(self.noise[t]) * noise

    def velocity(self, x_0, noise, t):
        """The network's target, v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (PD, section 4)."""
        return per_picture(self.signal[t]) * noise - per_picture(self.noise[t]) * x_0

    def predict_x0(self, v, x_t, t):
        """The clean picture that v stands for, x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v (PD, appendix D)."""
        return per_picture(self.signal[t]) * x_t - per_picture(self.noise[t]) * v

    def posterior(self, x_0, x_t, t, earlier):
        """Mean (B, 3, H, W) and standard deviation, a float, of q(x_s | x_t, x_0); t and s = `earlier` are ints.

        With s = t - 1 this is DDPM Eq. 7; further back, the steps between are taken as one (DDIM Eq. 12 and 16 with
        eta 1). At s = -1, the clean picture, the mean is x_0 and the deviation 0.
        """
        alpha_bar_t, alpha_bar_s = self.alpha_bars[t], self.alpha_bars[earlier] if earlier >= 0 else 1.0
        beta = 1 - alpha_bar_t / alpha_bar_s                          # of all the steps from s to t
        mean = (math.sqrt(alpha_bar_s) * beta / (1 - alpha_bar_t) * x_0
                + math.sqrt(1 - beta) * (1 - alpha_bar_s) / (1 - alpha_bar_t) * x_t)
        return mean, math.sqrt(beta * (1 - alpha_bar_s) / (1 - alpha_bar_t))

    def log_snr(self, t):
        """lambda_t, the logarithm of signal over noise, which is how DPM++ counts time; t an int."""
        return math.log(self.alpha_bars[t] / (1 - self.alpha_bars[t])) / 2

    def look_ahead(self, x_0, last_x_0, last, t, earlier):
        """The clean estimate halfway from t to `earlier`, if it goes on changing as it did from `last` to t.

        It is D in DPM++ Algorithm 2. A `step` by it is one of SDE-DPM-Solver++(2M): second order in place of first.
        """
        h, last_h = self.log_snr(earlier) - self.log_snr(t), self.log_snr(t) - self.log_snr(last)
        return x_0 + h / (2 * last_h) * (x_0 - last_x_0)

    def step(self, x_0, x_t, t, earlier, generators):
        """x_s, drawn from the posterior of a clean estimate (DDPM Algorithm 2). Each picture has its generator."""
        mean, std = self.posterior(x_0, x_t, t, earlier)
        z = torch.stack([torch.randn(x_t.shape[1:], generator=g) for g in generators])  # on the CPU: same everywhere
        return mean + std * z.to(x_t.device)

    def timesteps(self, steps):
        """`steps` different times from T-1, pure noise, down towards 0: list of ints.

        They lie on a parabola (DDIM, appendix D.2): close together at the end, where the fine detail is drawn.
        """
        left = range(steps, 0, -1)                                    # steps still to be done, this one included
        return [max(round(self.num_timesteps * (n / steps) ** 2), n) - 1 for n in left]

    @torch.no_grad()
    def sample(self, unet, noise, text, no_text, generators, steps=50, guidance_scale=3.0, on_step=None):
        """Run the process backwards: noise (B, 3, H, W) -> pictures (B, 3, H, W) in [-1, 1].

        text, no_text: (states (B, L, D), mask (B, L)) of the captions and of the empty caption, of one length L.
        generators: a CPU random generator for each picture.
        steps: T (1,000) is DDPM; fewer take several of its steps at once, and look ahead.
        guidance_scale: 1 is plain conditional sampling; above 1 steps further from 'no caption' towards the caption.
        on_step: called after every step with its x_t, for a progress bar or an animation.
        """
        guided = guidance_scale != 1
        (context, mask), (no_context, no_mask) = text, no_text
        if guided:                                                      # both answers from one batched pass
            context, mask = torch.cat([no_context, context]), torch.cat([no_mask, mask])
        times = self.timesteps(steps)
        x_t, last, last_x_0 = noise, None, None
        for now, earlier in zip(times, times[1:] + [-1]):
            t = torch.full((len(x_t),), now, device=x_t.device)         # (B,)

            # 1. The network's estimate, twice the batch where it is guided
            if guided:
                v_empty, v_text = unet(torch.cat([x_t, x_t]), torch.cat([t, t]), context, mask).chunk(2)
                v = v_empty + guidance_scale * (v_text - v_empty)       # CFG Eq. 6 with w = guidance_scale - 1
            else:
                v = unet(x_t, t, context, mask)

            # 2. The clean picture it stands for. Colours lie in [-1, 1]: clipping keeps errors from piling up.
            x_0 = self.predict_x0(v, x_t, t).clamp(-1, 1)

            # 3. Where several steps are taken at once, look ahead; the first has nothing to go by yet, and the last
            # ends at the estimate itself
            ahead = x_0
            if steps < self.num_timesteps and last is not None and earlier >= 0:
                ahead = self.look_ahead(x_0, last_x_0, last, now, earlier)
            last, last_x_0 = now, x_0

            # 4. Less noise: back to the time before
            x_t = self.step(ahead, x_t, now, earlier, generators)
            if on_step:
                on_step(x_t)
        return x_t


def generator_for(*key):
    """A CPU random generator that follows from some whole numbers >= 0 alone, so that no draw depends on history."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def to_uint8(x):
    """Pictures in [-1, 1] -> bytes 0 ... 255, clamped first: an uint8 cast alone would turn -0.02 into 251."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

