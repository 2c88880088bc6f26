"""A small text-to-image diffusion model: CLIP tokens -> UNet with spatial transformers -> DDPM.

Shapes: B pictures, C channels, H x W pixels, N = H * W positions, L caption tokens, D their width.
Symbols, as in the papers: x_0 is a picture in [-1, 1]; x_t the same after t of T = 1,000 steps of noise, t = 1 ... T;
alpha_bar_t the share of the picture's variance left in x_t, from alpha_bar_0 = 1 (the clean picture) to almost 0.

Papers, named at each formula by these short names:
    DDPM   Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239
    iDDPM  Nichol and Dhariwal 2021, Improved DDPM, arXiv 2102.09672
    CFG    Ho and Salimans 2022, Classifier-Free Diffusion Guidance, arXiv 2207.12598
    LDM    Rombach et al. 2021, Latent Diffusion, arXiv 2112.10752 (spatial transformer)
    JiT    Li and He 2025, Back to Basics: Let Denoising Generative Models Denoise, arXiv 2511.13720 (x_0-prediction)
    DDIM   Song et al. 2020, Denoising Diffusion Implicit Models, arXiv 2010.02502 (few steps)
    DPM++  Lu et al. 2022, DPM-Solver++, arXiv 2211.01095 (few steps)
"""
import hashlib
import math
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

DOWNSAMPLING = 8        # the UNet's downsampling factor, 2 ** 3: a picture's sides are multiples of it
GROUPS = 16             # groups of channels that GroupNorm normalises, each by itself
HEAD_DIM = 32           # channels of one attention head
NO_CAPTION = -1         # row of the empty caption: wherever captions are encoded, it is the last
GUIDANCE_MIN_T = 50     # few steps: no guidance from here on; at so little noise it blurs eyes and takes time


# ---------------------------------------------------------------------------------------------- network

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
        context = x if context is None else context                      # (B, L, context_dim)
        q, k, v = (tokens.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)  # (B, heads, N or L, HEAD_DIM)
                   for tokens in (self.to_q(x), self.to_k(context), self.to_v(context)))
        # softmax(q k^T / sqrt(d)) v: Vaswani et al. 2017, arXiv 1706.03762, Eq. 1. Written out, since torch's fused
        # version is no faster for so few positions, and has given wrong results on Apple's GPU
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)           # (B, heads, N, L)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)  # padding is not looked at
        out = scores.softmax(dim=-1) @ v                                 # (B, heads, N, HEAD_DIM)
        return self.to_out(out.transpose(1, 2).reshape(B, N, C))         # (B, N, C)


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
    """Two convolutions and a skip path; t scales and shifts the features between them (iDDPM, appendix A).

    Both paths start from the normalised input. If only the convolutions did, nothing would bound what is handed from
    level to level: in a long run its scale grew a billionfold.
    """
    def __init__(self, in_channels, out_channels, time_dim):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(time_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(GROUPS, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, t_emb):
        x = self.norm1(x)                                                       # (B, in_channels, H, W)
        h = self.conv1(F.silu(x))                                               # (B, out_channels, H, W)
        scale, shift = self.time_proj(t_emb)[:, :, None, None].chunk(2, dim=1)  # (B, out_channels, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift                                 # (B, out_channels, H, W)
        return self.skip(x) + self.conv2(F.silu(h))                             # (B, out_channels, H, W)


class DownBlock(nn.Module):
    """A level of the way down: ResnetBlock, and SpatialTransformer if `context_dim`, the text's width, is given."""
    def __init__(self, in_channels, out_channels, time_dim, context_dim=None):
        super().__init__()
        self.resnet = ResnetBlock(in_channels, out_channels, time_dim)
        self.transformer = SpatialTransformer(out_channels, context_dim) if context_dim else None

    def forward(self, x, t_emb, *caption):
        x = self.resnet(x, t_emb)                                      # (B, out_channels, H, W)
        return self.transformer(x, *caption) if self.transformer else x  # (B, out_channels, H, W)


class MiddleBlock(nn.Module):
    """The deepest features: ResnetBlock, SpatialTransformer, ResnetBlock."""
    def __init__(self, channels, time_dim, context_dim):
        super().__init__()
        self.resnet1 = ResnetBlock(channels, channels, time_dim)
        self.transformer = SpatialTransformer(channels, context_dim)
        self.resnet2 = ResnetBlock(channels, channels, time_dim)

    def forward(self, x, t_emb, context, mask):
        x = self.transformer(self.resnet1(x, t_emb), context, mask)  # (B, C, H, W)
        return self.resnet2(x, t_emb)                                # (B, C, H, W)


class UpBlock(DownBlock):
    """The same on the way up: the upsampled features concatenated with the DownBlock's (skip connection)."""
    def forward(self, x, skip, t_emb, *caption):
        if x.requires_grad:  # cat's gradient is a slice, whose strides some operations on Apple's GPU have ignored
            x.register_hook(torch.clone)
        return super().forward(torch.cat([x, skip], dim=1), t_emb, *caption)


class UNet(nn.Module):
    """x_0 = unet(x_t, t, context, mask): the clean picture that is hidden in a noisy one, given its caption.

    x_t (B, 3, H, W), H and W multiples of DOWNSAMPLING; t (B,) integers 1 ... T; context (B, L, D) the
    states of the caption's tokens; mask (B, L) True for real tokens, at least one per row. Returns x_0 (B, 3, H, W).
    It predicts x_0 and not the noise: pictures lie near a low-dimensional manifold, noise does not (JiT).
    channels: c, a multiple of HEAD_DIM, the first level's width; context_dim: D; image_size: kept for the sampler.
    """
    def __init__(self, image_size=64, channels=64, context_dim=512):
        super().__init__()
        self.config = dict(image_size=image_size, channels=channels, context_dim=context_dim)  # to rebuild it
        c, time_dim = channels, 4 * channels
        self.time_mlp = nn.Sequential(nn.Linear(c, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU())
        # Mean and standard deviation over the captions, set by train_diffusion.py: what is left is what a caption says
        self.register_buffer("text_mean", torch.zeros(context_dim))             # (D,)
        self.register_buffer("text_std", torch.ones(context_dim))               # (D,)

        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.down1 = DownBlock(c, c, time_dim)
        self.downsample1 = nn.Conv2d(c, 2 * c, 2, stride=2)
        self.down2 = DownBlock(2 * c, 2 * c, time_dim)
        self.downsample2 = nn.Conv2d(2 * c, 3 * c, 2, stride=2)
        self.down3 = DownBlock(3 * c, 3 * c, time_dim)
        self.downsample3 = nn.Conv2d(3 * c, 4 * c, 2, stride=2)
        self.down4 = DownBlock(4 * c, 4 * c, time_dim, context_dim)
        self.middle = MiddleBlock(4 * c, time_dim, context_dim)
        self.up4 = UpBlock(8 * c, 4 * c, time_dim, context_dim)
        # Upsampling: a 1x1 convolution gives each position 4 times the channels, PixelShuffle lays them out as 2x2
        self.upsample3 = nn.Sequential(nn.Conv2d(4 * c, 3 * c * 4, 1), nn.PixelShuffle(2))
        self.up3 = UpBlock(6 * c, 3 * c, time_dim, context_dim)  # attention here too: shapes follow their words better
        self.upsample2 = nn.Sequential(nn.Conv2d(3 * c, 2 * c * 4, 1), nn.PixelShuffle(2))
        self.up2 = UpBlock(4 * c, 2 * c, time_dim)
        self.upsample1 = nn.Sequential(nn.Conv2d(2 * c, c * 4, 1), nn.PixelShuffle(2))
        self.up1 = UpBlock(2 * c, c, time_dim)
        self.norm_out = nn.GroupNorm(GROUPS, c)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, x_t, t, context, mask):
        t_emb = self.time_mlp(timestep_embedding(t, self.config["channels"]))  # (B, 4c)
        context = (context - self.text_mean) / self.text_std                   # (B, L, D)
        # Down
        skip1 = self.down1(self.conv_in(x_t), t_emb)                           # (B, c, 64, 64) for 64x64 pixels
        skip2 = self.down2(self.downsample1(skip1), t_emb)                     # (B, 2c, 32, 32)
        skip3 = self.down3(self.downsample2(skip2), t_emb)                     # (B, 3c, 16, 16)
        skip4 = self.down4(self.downsample3(skip3), t_emb, context, mask)      # (B, 4c, 8, 8)
        # Middle
        x = self.middle(skip4, t_emb, context, mask)                           # (B, 4c, 8, 8)
        # Up
        x = self.up4(x, skip4, t_emb, context, mask)                           # (B, 4c, 8, 8)
        x = self.up3(self.upsample3(x), skip3, t_emb, context, mask)           # (B, 3c, 16, 16)
        x = self.up2(self.upsample2(x), skip2, t_emb)                          # (B, 2c, 32, 32)
        x = self.up1(self.upsample1(x), skip1, t_emb)                          # (B, c, 64, 64)
        return self.conv_out(F.silu(self.norm_out(x))).float()                 # (B, 3, 64, 64)


class UserError(Exception):
    """A user's mistake: `run` prints it as one line. Every other exception is a bug and shows its traceback."""


@contextmanager
def user_errors(what, hub_name=None):
    """Whatever fails inside becomes a UserError: `what`, and its innermost cause. hub_name: if the hub may have it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library's own, the network's or the disk's
        while error.__cause__ or error.__context__:
            error = error.__cause__ or error.__context__
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        if hub_name and not os.path.exists(hub_name):
            why += (" (if the Hugging Face Hub can't be reached: set HF_ENDPOINT to a mirror, give a local folder, or "
                    "train with --demo)")
        raise UserError(f"{what}: {why}")


class TextEncoder(nn.Module):
    """The frozen text half of CLIP: captions -> the states of their tokens.

    name: a Hugging Face model name or a local folder. Raises UserError if it can't be had, or is no CLIP.
    """
    def __init__(self, name):
        super().__init__()
        import huggingface_hub as hub
        try:
            os.path.exists(name) or hub.get_session().head(hub.constants.ENDPOINT, timeout=10)
        except Exception:                            # unreachable: use the cache; the libraries retry for minutes
            hub.constants.HF_HUB_OFFLINE = True
        import transformers                          # takes seconds to import: only where captions are encoded
        transformers.logging.set_verbosity_error()   # no list of CLIP's picture weights, which stay unused
        transformers.logging.disable_progress_bar()
        with user_errors(f"--text-encoder: {name}", name):
            self.tokenizer = transformers.CLIPTokenizer.from_pretrained(name)
            kind = transformers.AutoConfig.from_pretrained(name).model_type
            self.clip, found = transformers.CLIPTextModel.from_pretrained(name, output_loading_info=True)
        missing, words = len(found["missing_keys"]), len(self.tokenizer)
        if missing or "clip" not in kind or words != self.clip.config.vocab_size:  # transformers itself would go on
            raise UserError(f"--text-encoder: {name} is no CLIP text encoder with its tokenizer: model type {kind}, "
                            f"{missing} weights missing, {words} words")
        self.clip.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, captions):
        """List of B strings -> states (B, L, D), float32, and mask (B, L), True for real tokens, at least two per row.

        L is the longest caption's length. CLIP reads at most 77 tokens: longer captions are truncated.
        """
        limit = self.clip.config.max_position_embeddings
        tokens = self.tokenizer(captions, truncation=True, max_length=limit, padding=True, return_tensors="pt")
        states = self.clip(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state
        return states.float(), tokens["attention_mask"].bool()


# ---------------------------------------------------------------------------------------------- diffusion

def noise_like(x, generators):
    """Normal noise (B, 3, H, W), each picture's by its own CPU generator: a seed means the same on every device."""
    return torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators]).to(x.device)


def generator_for(*key):
    """A CPU random generator that follows from its key alone, so that no draw depends on what was drawn before."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big"))


class NoiseScheduler(nn.Module):
    """The forward process q, its posterior, and samplers that run it backwards. Tables: an entry for t = 0 ... T."""
    def __init__(self, num_timesteps=1000):
        super().__init__()
        self.num_timesteps = T = num_timesteps
        # The cosine schedule, iDDPM Eq. 17, its betas capped at 0.999 so that no step erases everything
        u = torch.arange(T + 1, dtype=torch.float64) / T                        # (T + 1,) from 0 to 1
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)                            # beta_1 ... beta_T
        alpha_bar = torch.cat([torch.ones(1), torch.cumprod(1 - beta, dim=0)])  # alpha_bar_0 ... alpha_bar_T
        self.alpha_bar = alpha_bar.tolist()                                     # float64, for `step`
        alpha_bar = alpha_bar.view(T + 1, 1, 1, 1)                              # so that [t], t (B,), is (B, 1, 1, 1)
        self.register_buffer("sqrt_alpha_bar", alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("sqrt_one_minus_alpha_bar", (1 - alpha_bar).sqrt().float(), persistent=False)

    def add_noise(self, x_0, noise, t):
        """x_t, drawn from q(x_t | x_0): t steps of noise at once (DDPM Eq. 4). x_0, noise (B, 3, H, W); t (B,)."""
        return self.sqrt_alpha_bar[t] * x_0 + self.sqrt_one_minus_alpha_bar[t] * noise

    def step(self, x_0, x_t, t, s, z):
        """x_s, drawn from q(x_s | x_t, x_0): t > s >= 0 are ints, z is normal noise, all tensors (B, 3, H, W).

        With s = t - 1 this is DDPM Eq. 7. Further back it is Eq. 7 for one long step with the beta of all of them,
        which is exact (DDIM Eq. 12 and 16 with eta = 1; their alpha is our alpha_bar): only x_0 is an estimate.
        """
        alpha_bar_t, alpha_bar_s = self.alpha_bar[t], self.alpha_bar[s]
        alpha = alpha_bar_t / alpha_bar_s
        beta = 1 - alpha
        mean = (math.sqrt(alpha_bar_s) * beta / (1 - alpha_bar_t) * x_0
                + math.sqrt(alpha) * (1 - alpha_bar_s) / (1 - alpha_bar_t) * x_t)
        variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta                 # 0 if s = 0
        return mean + math.sqrt(variance) * z

    def predict(self, unet, x_t, t, caption, no_caption, guidance_scale, early=None):
        """The network's estimate of x_0 (B, 3, H, W), guided and clipped. Arguments as for `sample`."""
        t = torch.full((len(x_t),), t, device=x_t.device)                       # (B,)
        x_0 = unet(x_t, t, *caption)
        if guidance_scale != 1:
            # CFG Eq. 6 with w = guidance_scale - 1, and x_0 for epsilon: if x_t is given, one is affine in the other
            x_0_empty = (early or unet)(x_t, t, *no_caption)
            x_0 = x_0_empty + guidance_scale * (x_0 - x_0_empty)
        return x_0.clamp(-1, 1)                                                 # so that no error piles up

    @torch.no_grad()
    def sample(self, unet, x_t, caption, no_caption, guidance_scale, generators, early=None):
        """DDPM Algorithm 2, from x_T, pure noise (B, 3, H, W). Yields x_{T-1}, ..., x_0, the last one in [-1, 1].

        caption, no_caption: (states (B, L, D), mask (B, L)) of the captions and of the empty caption. guidance_scale:
        0 is without the caption, 1 plain conditional sampling, above 1 guided. generators: as for `noise_like`.
        early: an early state of unet, asked without the caption in its place (after arXiv 2406.02507); None is CFG.
        """
        for t in range(self.num_timesteps, 0, -1):
            x_0 = self.predict(unet, x_t, t, caption, no_caption, guidance_scale, early)
            x_t = self.step(x_0, x_t, t, t - 1, noise_like(x_t, generators))
            yield x_t

    # The rest makes sampling 20 times as fast: SDE-DPM-Solver++(2M), a second-order solver (DPM++ Algorithm 2)

    def timesteps(self, steps):
        """steps + 1 ints from T down to 0, on a parabola (DDIM, appendix D.2): close together where detail is drawn."""
        return [max(round(self.num_timesteps * (n / steps) ** 2), n) for n in range(steps, -1, -1)]

    def extrapolate(self, x_0, x_0_prev, t_prev, t, s):
        """The estimate of x_0 in the middle of the step from t to s, if it goes on changing as from t_prev to t.

        Linear in half the log-SNR, lambda = log(alpha_bar / (1 - alpha_bar)) / 2, in which the middle is meant too.
        """
        lambda_prev, lambda_t, lambda_s = (math.log(self.alpha_bar[i] / (1 - self.alpha_bar[i])) / 2
                                           for i in (t_prev, t, s))
        return x_0 + (lambda_s - lambda_t) / (2 * (lambda_t - lambda_prev)) * (x_0 - x_0_prev)

    @torch.no_grad()
    def sample_few_steps(self, unet, x_t, caption, no_caption, guidance_scale, generators, steps, early=None):
        """As `sample`, but in 1 to T - 1 longer steps."""
        t_prev = x_0_prev = scale_prev = None
        times = self.timesteps(steps)
        for t, s in zip(times, times[1:]):
            scale = guidance_scale if t > GUIDANCE_MIN_T else min(guidance_scale, 1)
            x_0 = self.predict(unet, x_t, t, caption, no_caption, scale, early)
            # Not in the first step, nor where guidance has just ended (it would be in x_0 - x_0_prev), nor at lambda_0
            x_0_mid = self.extrapolate(x_0, x_0_prev, t_prev, t, s) if scale == scale_prev and s else x_0
            t_prev, x_0_prev, scale_prev = t, x_0, scale
            x_t = self.step(x_0_mid, x_t, t, s, noise_like(x_t, generators))
            yield x_t


def to_uint8(x):
    """Pictures in [-1, 1] -> bytes 0 ... 255, clamped first: a uint8 cast alone would turn -1.04 into 251."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------- what both scripts need

def pick_device(name):
    """'auto', 'cuda', 'mps' or 'cpu' -> torch.device. Raises UserError for one that this machine does not have."""
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    names = [device for device in available if available[device]]
    if name not in ("auto", *names):
        raise UserError(f"--device {name}: this machine has {', '.join(names)}")
    return torch.device(names[0] if name == "auto" else name)


def place(network, device):
    """Move a network to its device. channels_last makes convolutions faster, but has gone wrong on Apple's GPU."""
    return network.to(device, memory_format=torch.preserve_format if device.type == "mps" else torch.channels_last)


def autocast(device, precision):
    """A context for forward passes: bf16 if asked for, or with 'auto' if the hardware has it, else fp32."""
    cpu = getattr(torch.cpu, "get_capabilities", dict)()                        # torch before 2.10 can't be asked
    has_bf16 = dict(cuda=torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
                    cpu=cpu.get("avx512_bf16") or cpu.get("amx_bf16"),
                    mps=False)                                                  # slower there (karpathy/nanochat#685)
    enabled = precision == "bf16" or precision == "auto" and has_bf16[device.type]
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(enabled))
