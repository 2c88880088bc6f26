"""model.py: the network, the text encoder, the schedule and the sampler, against independent sources."""
import io
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import sample_diffusion
from conftest import ROOT
from model import (GUIDANCE_MIN_T, HEAD_DIM, Attention, NoiseScheduler, UNet, UpBlock, UserError, generator_for,
                   noise_like, place, to_uint8)


def inputs(B=2, L=5, size=32, dim=24, seed=0):
    """x_t (B, 3, size, size), t (B,), context (B, L, dim), mask (B, L)."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, 3, size, size, generator=g), torch.randint(1, 1001, (B,), generator=g),
            torch.randn(B, L, dim, generator=g), torch.ones(B, L, dtype=torch.bool))


# ---------------------------------------------------------------------------------------------- UNet

@torch.no_grad()
def test_the_same_input_gives_the_same_output(unet):
    assert torch.equal(unet(*inputs()), unet(*inputs()))


@torch.no_grad()
def test_the_caption_and_the_time_change_the_output_and_padding_never_does(unet):
    x, t, context, mask = inputs()
    x_0 = unet(x, t, context, mask)
    assert (unet(x, t, context + 0.5 * torch.randn_like(context), mask) - x_0).abs().max() > 1e-3
    assert (unet(x, 1 + (t + 300) % 1000, context, mask) - x_0).abs().max() > 1e-3
    padding = 100 * torch.randn(2, 9, 24)
    padded = unet(x, t, torch.cat([context, padding], 1), torch.cat([mask, torch.zeros(2, 9, dtype=torch.bool)], 1))
    assert (padded - x_0).abs().max() < 1e-5


@torch.no_grad()
def test_every_token_of_a_caption_reaches_the_output(unet):
    x, t, context, mask = inputs()
    for token in range(context.shape[1]):
        changed = context.clone()
        changed[:, token] = torch.randn(2, 24)
        assert (unet(x, t, changed, mask) - unet(x, t, context, mask)).abs().max() > 1e-4


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    unet = UNet(image_size=32, channels=32, context_dim=24)
    (unet(*inputs()) - 1).square().mean().backward()
    without = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@torch.no_grad()
def test_the_scale_of_the_features_does_not_multiply_from_level_to_level():
    """A long run was lost to that: from step 2,400 on the features grew to a billion, and what blocks add drowned."""
    torch.manual_seed(0)
    unet = UNet(image_size=32, channels=32, context_dim=24)
    seen = []
    unet.norm_out.register_forward_hook(lambda module, args, out: seen.append(args[0].std().item()))
    unet(*inputs())
    between = [module for name, module in unet.named_modules() if isinstance(module, torch.nn.Conv2d)
               and (name.endswith("skip") or name.startswith(("downsample", "upsample")))]
    assert len(between) == 10
    for module in between:
        module.weight *= 10
    unet(*inputs())
    assert seen[1] < 11 * seen[0]


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (32, 48), (64, 64)])
@pytest.mark.parametrize("length", [1, 2, 77])
def test_any_caption_length_and_any_size_that_divides(unet, size, length):
    x = torch.randn(1, 3, *size)
    mask = torch.ones(1, length, dtype=torch.bool)
    assert unet(x, torch.tensor([5]), torch.randn(1, length, 24), mask).shape == x.shape


def test_a_size_that_does_not_divide_gives_no_picture(unet):
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        unet(torch.randn(1, 3, 32, 36), *[part[:1] for part in inputs()[1:]])


@torch.no_grad()
def test_in_half_precision_the_picture_is_still_float32_and_nearly_the_same(unet):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = unet(*inputs())
    expected = unet(*inputs())
    assert found.dtype == torch.float32 and (found - expected).norm() < 0.05 * expected.norm()
    assert not torch.equal(found, expected)


def test_the_default_network_costs_a_quarter_of_the_code_it_started_from():
    from torch.utils.flop_counter import FlopCounterMode
    unet = UNet()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        unet(*inputs(B=1, L=20, size=64, dim=512))
    assert flops.get_total_flops() / 2e9 < 15.5 / 4  # GMAC of one forward pass


@torch.no_grad()
def test_only_the_blocks_that_attend_get_the_caption(unet):
    given = {}
    for name in ("down1", "down2", "down3", "down4", "middle", "up4", "up3", "up2", "up1"):
        getattr(unet, name).register_forward_pre_hook(lambda module, args, name=name: given.update({name: args}))
    x, t, context, mask = inputs()
    unet(x, t, context, mask)
    attending = {name for name in given if getattr(unet, name).transformer}
    assert {"down4", "middle", "up4"} <= attending and attending.isdisjoint({"down1", "down2", "up2", "up1"})
    for name, args in given.items():
        features_and_time = 3 if name.startswith("up") else 2
        caption = args[features_and_time:]
        assert len(caption) == (2 if name in attending else 0), name
        assert not caption or torch.equal(caption[0], context) and caption[1] is mask  # the states' mean is 0 here


@torch.no_grad()
def test_what_is_the_same_in_all_captions_is_taken_from_their_states(unet):
    x, t, context, mask = inputs()
    expected = unet(x, t, (context - 3) / 2, mask)
    unet.text_mean += 3
    unet.text_std *= 2
    assert torch.equal(unet(x, t, context, mask), expected)


def is_dense(tensor):
    """Do its numbers fill a piece of memory without gaps, in whatever order?"""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) == tensor.numel()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_that_an_up_block_hands_down_is_a_copy_of_the_slice(monkeypatch, memory_format):
    """Dense, with its own memory; and on the CPU, no gradient is another one than without that copy, bit for bit."""
    torch.manual_seed(0)
    block = UpBlock(64, 32, 24, 16).to(memory_format=memory_format)
    below, skip = (torch.randn(2, 32, 4, 4, requires_grad=True) for _ in range(2))
    arguments = torch.randn(2, 24), torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    # A function that notes the gradient as it arrives, before anything else can copy it
    arrived = []

    class Note(torch.autograd.Function):
        """The identity."""

        @staticmethod
        def forward(ctx, x):
            return x.clone(memory_format=memory_format)

        @staticmethod
        def backward(ctx, gradient):
            arrived.append(gradient)
            return gradient

    def gradients():
        leaves = [below, skip, *block.parameters()]
        return torch.autograd.grad(block(Note.apply(below), skip, *arguments).square().sum(), leaves)
    copied = gradients()
    monkeypatch.setattr(torch.Tensor, "register_hook", lambda tensor, hook: None)
    sliced = gradients()
    assert all(torch.equal(a, b) for a, b in zip(copied, sliced))
    assert [is_dense(gradient) for gradient in arrived] == [True, False]
    assert arrived[0].untyped_storage().nbytes() == 4 * below.numel()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_gradient_of_the_network_is_dense(memory_format):
    """Also those of the skip connections, which autograd adds to others: as each operation's backward gets them."""
    torch.manual_seed(0)
    unet, dense = UNet(image_size=32, channels=32, context_dim=24).to(memory_format=memory_format), {}

    def note(name):
        def forward_hook(module, args, out):
            out.grad_fn.register_prehook(lambda gradients: dense.update({name: is_dense(gradients[0])}))
        return forward_hook
    for name, module in unet.named_modules():
        module.register_forward_hook(note(name))
    unet(*inputs()).backward(torch.randn(2, 3, 32, 32))
    assert len(dense) > 100 and {"upsample1", "upsample2", "upsample3", "middle", "down1", "down4"} <= dense.keys()
    assert [name for name in dense if not dense[name]] == []


@pytest.mark.parametrize("kind, memory_format", [("cpu", torch.channels_last), ("cuda", torch.channels_last),
                                                 ("mps", torch.preserve_format)])
def test_channels_last_is_for_the_cpu_and_cuda_alone(kind, memory_format):
    asked = []
    network = SimpleNamespace(to=lambda *args, **kwargs: asked.append((args, kwargs)) or "placed")
    device = torch.device(kind)
    assert place(network, device) == "placed" and asked == [((device,), dict(memory_format=memory_format))]


def test_channels_last_changes_no_result(unet):
    """But for the rounding: forward, and every gradient."""
    expected = unet(*inputs())
    expected.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in unet.named_parameters()}
    unet.zero_grad()
    assert place(unet, torch.device("cpu")) is unet
    weights = [p for p in unet.parameters() if p.ndim == 4 and min(p.shape[1], p.shape[2]) > 1]  # else it is both
    assert len(weights) > 20 and all(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
                                     for p in weights)
    found = unet(*inputs())
    assert torch.allclose(found, expected, atol=1e-5)
    found.square().mean().backward()
    for name, p in unet.named_parameters():
        assert (p.grad - gradients[name]).norm() <= 1e-4 * gradients[name].norm(), name


@pytest.mark.parametrize("cross", [True, False])
def test_attention_is_that_of_torch(cross):
    """Softmax and weights against torch's own function, in float64; padded tokens do not count."""
    torch.manual_seed(0)
    dim = 2 * HEAD_DIM
    attention = Attention(dim, 16 if cross else dim).double()
    x = torch.randn(3, 5, dim).double()
    context = torch.randn(3, 7, 16).double() if cross else x
    mask = torch.arange(7) < torch.tensor([7, 1, 4])[:, None] if cross else None
    q, k, v = (part.unflatten(-1, (2, HEAD_DIM)).transpose(1, 2)
               for part in (attention.to_q(x), attention.to_k(context), attention.to_v(context)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :] if cross else None)
    found = attention(x, context, mask) if cross else attention(x)
    assert torch.allclose(found, attention.to_out(out.transpose(1, 2).flatten(2)), atol=1e-12)


# ---------------------------------------------------------------------------------------------- TextEncoder

def test_captions_become_token_states_and_a_mask(encoder):
    states, mask = encoder(["a red creature", "a red creature with a blue tail", ""])
    assert states.shape == (3, mask.shape[1], encoder.clip.config.hidden_size) and states.dtype == torch.float32
    assert mask.sum(1).tolist() == [5, 9, 2]  # each with its start and its end
    assert not states.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    alone, _ = encoder(["a red creature"])
    assert torch.allclose(alone[0], states[0, :5], atol=1e-5)


def test_long_captions_are_truncated_to_what_clip_reads(encoder):
    states, mask = encoder(["a red creature " * 4000, "a blue creature"])
    assert states.shape[1] == 77 and mask.sum(1).tolist() == [77, 5]
    shorter, _ = encoder(["a red creature " * 25])  # 75 tokens, and the start's and the end's
    assert torch.allclose(states[0], shorter[0], atol=1e-5)


# ---------------------------------------------------------------------------------------------- NoiseScheduler

# alpha_bar, and the posterior's variance and two weights, from the betas of diffusers'
# DDPMScheduler(beta_schedule='squaredcos_cap_v2') in float64. Its t is ours minus 1
EXPECTED = {1: [0.9999587, 0.0, 1.0, 0.0],
            2: [0.9999126, 2.17895e-05, 0.5277814, 0.4722186],
            101: [0.9715757, 0.0005222236, 0.01844986, 0.9815483],
            501: [0.4922852, 0.003146005, 0.004367867, 0.9953563],
            901: [0.02361611, 0.01973224, 0.003138349, 0.9895976],
            999: [2.428767e-06, 0.7499939, 0.002337676, 0.499997],
            1000: [2.428736e-09, 0.9989976, 0.001556892, 0.0316225]}


@pytest.mark.parametrize("t", EXPECTED)
def test_the_schedule_has_the_expected_numbers(scheduler, t):
    weight_of_x0, weight_of_xt, std = (scheduler.step(*parts, t, t - 1, z)
                                       for *parts, z in [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
    found = [scheduler.alpha_bar[t], std ** 2, weight_of_x0, weight_of_xt]
    assert found == pytest.approx(EXPECTED[t], abs=1e-6)


def test_the_schedule_is_the_papers_closed_form(scheduler):
    def f(u):  # iDDPM Eq. 17
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    assert len(scheduler.alpha_bar) == 1001
    for t in (0, 1, 2, 501, 999):
        assert scheduler.alpha_bar[t] == pytest.approx(f(t / 1000) / f(0), abs=1e-6)
    assert 1 - scheduler.alpha_bar[1000] / scheduler.alpha_bar[999] <= 0.999 + 1e-4
    assert 1 - scheduler.alpha_bar[1000] / scheduler.alpha_bar[999] >= 0.998


def test_time_0_is_the_clean_picture(scheduler):
    x, noise = torch.randn(2, 1, 3, 8, 8)
    assert scheduler.alpha_bar[0] == 1
    assert torch.equal(scheduler.add_noise(x, noise, torch.tensor([0])), x)
    assert torch.equal(scheduler.step(x, 100 * noise, 1, 0, 100 * noise), x)  # DDPM Algorithm 2: no noise if t = 1


def test_the_tables_are_those_of_alpha_bar_rounded_once(scheduler):
    """float32 as it is nearest to float64, where 1 - alpha_bar keeps its digits; none of them in a checkpoint."""
    alpha_bar = torch.tensor(scheduler.alpha_bar, dtype=torch.float64).view(-1, 1, 1, 1)
    assert torch.equal(scheduler.sqrt_alpha_bar, alpha_bar.sqrt().float())
    assert torch.equal(scheduler.sqrt_one_minus_alpha_bar, (1 - alpha_bar).sqrt().float())
    assert not scheduler.state_dict()


def test_noise_is_added_as_diffusers_does(scheduler):
    theirs = diffusers_scheduler("DDPMScheduler", 1000)
    x_0, noise, t = torch.rand(50, 3, 8, 8) * 2 - 1, torch.randn(50, 3, 8, 8), torch.arange(50) * 19
    expected = theirs.add_noise(x_0.double(), noise.double(), t)
    assert (scheduler.add_noise(x_0, noise, t + 1) - expected).abs().max() < 1e-5


def test_a_noisy_picture_has_the_variance_of_the_clean_one_and_of_the_noise(scheduler):
    x_0, noise = torch.randn(50, 3, 8, 8), torch.randn(50, 3, 8, 8)
    assert scheduler.add_noise(x_0, noise, 1 + torch.arange(50) * 19).var().item() == pytest.approx(1, abs=0.05)


def diffusers_scheduler(name, steps):
    """diffusers' scheduler of that name, its tables in float64: in float32, 1 - alpha_bar loses digits near 0."""
    diffusers = pytest.importorskip("diffusers")
    common = dict(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=True,
                  timestep_spacing="trailing")
    theirs = getattr(diffusers, name)(**common)
    theirs.betas = theirs.betas.double()
    theirs.alphas = 1 - theirs.betas
    theirs.alphas_cumprod = theirs.alphas.cumprod(0)
    theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    theirs.set_timesteps(steps)
    return theirs


def answer_and_picture():
    """A network's answer, beyond [-1, 1] here and there, an x_t and fresh noise, in float64: (1, 3, 8, 8) each."""
    return torch.randn(3, 1, 3, 8, 8, dtype=torch.float64, generator=generator_for("answer")).unbind()


@pytest.mark.parametrize("t", [1000, 999, 701, 301, 51, 2, 1])
def test_a_ddpm_step_is_that_of_diffusers(scheduler, t):
    theirs = diffusers_scheduler("DDPMScheduler", 1000)
    x_0, x_t, _ = answer_and_picture()
    expected = theirs.step(x_0, t - 1, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
    z = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (scheduler.step(x_0.clamp(-1, 1), x_t, t, t - 1, z) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_a_step_over_several_times_is_that_of_diffusers(scheduler, steps):
    """Its DDIM with eta 1, which draws as much fresh noise as DDPM does."""
    theirs = diffusers_scheduler("DDIMScheduler", steps)
    x_0, x_t, z = answer_and_picture()
    for their_t in theirs.timesteps.tolist():
        t = their_t + 1
        expected = theirs.step(x_0, their_t, x_t, eta=1.0, use_clipped_model_output=True, variance_noise=z).prev_sample
        found = scheduler.step(x_0.clamp(-1, 1), x_t, t, t - 1000 // steps, z)
        assert (found - expected).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------- sampling

def test_the_times_run_from_pure_noise_to_the_clean_picture(scheduler):
    assert scheduler.timesteps(1000) == list(range(1000, -1, -1))
    assert scheduler.timesteps(5) == [1000, 640, 360, 160, 40, 0]  # 1,000 (n / 5)^2
    for steps in range(1, 1000):
        times = scheduler.timesteps(steps)
        assert len(times) == steps + 1 and times[0] == 1000 and times[-1] == 0
        assert times == sorted(set(times), reverse=True)


def way(scheduler, network, B=2, L=3, size=8, dim=24, steps=10, guidance_scale=2, early=None):
    """The x_t of all steps, from fixed noise and captions, by the sampler that draws in that many: a generator."""
    caption = torch.randn(B, L, dim, generator=generator_for(1)), torch.ones(B, L, dtype=torch.bool)
    no_caption = torch.zeros(B, L, dim), torch.tensor([[True] + [False] * (L - 1)] * B)
    noise = torch.randn(B, 3, size, size, generator=generator_for(2))
    arguments = network, noise, caption, no_caption, guidance_scale, [generator_for(3, i) for i in range(B)]
    if steps == scheduler.num_timesteps:
        return scheduler.sample(*arguments, early=early)
    return scheduler.sample_few_steps(*arguments, steps, early=early)


def draw(*args, **kwargs):
    """The pictures at the end of that way: (B, 3, size, size)."""
    *_, x_0 = way(*args, **kwargs)
    return x_0


def wavy(x, t, context, mask):
    """A network of no use, but smooth, different at every time, and beyond [-1, 1] here and there."""
    return 1.2 * torch.sin(2 * x + t[:, None, None, None] / 200)


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_fewer_steps_are_those_of_diffusers_second_order_solver(scheduler, steps):
    """The whole way, from noise to picture, beside its SDE-DPM-Solver++(2M)."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", algorithm_type="sde-dpmsolver++",
        thresholding=True, sample_max_value=1.0)      # a threshold that is at least and at most 1: clipping to [-1, 1]
    theirs.alphas_cumprod = torch.tensor(scheduler.alpha_bar[1:], dtype=torch.float64)
    theirs.set_timesteps(timesteps=[t - 1 for t in scheduler.timesteps(steps)[:-1]])
    x, generator = torch.randn(1, 3, 32, 32, generator=generator_for(2)), generator_for(3, 0)
    for their_t in theirs.timesteps:                                         # float64: 1 - alpha_bar needs the digits
        z = torch.randn(1, 3, 32, 32, generator=generator)
        x = theirs.step(wavy(x, their_t[None] + 1, None, None), their_t, x, variance_noise=z).prev_sample
    found = draw(scheduler, wavy, B=1, size=32, steps=steps, guidance_scale=1)
    assert (found - x).abs().max() < 1e-4


def test_all_steps_are_plain_ddpm_bit_for_bit(scheduler):
    *found, last = way(scheduler, wavy, steps=1000, guidance_scale=1)
    x = torch.randn(2, 3, 8, 8, generator=generator_for(2))
    generators = [generator_for(3, i) for i in range(2)]
    for t in range(1000, 0, -1):  # DDPM Algorithm 2
        z = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generators])
        x = scheduler.step(wavy(x, torch.full((2,), t), None, None).clamp(-1, 1), x, t, t - 1, z)
        assert torch.equal(x, found[1000 - t] if t > 1 else last)
    assert len(found) == 999


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_each_step_yields_what_it_came_to_and_asks_the_network_when_it_is_wanted(scheduler, steps):
    asked = []

    def network(x, t, context, mask):
        asked.append(t.tolist())
        return wavy(x, t, context, mask)
    steps_taken = way(scheduler, network, steps=steps, guidance_scale=1)
    assert asked == []
    seen = []
    for number, x_t in enumerate(steps_taken):
        assert len(asked) == number + 1
        seen.append((x_t, x_t.clone()))
    assert len(seen) == steps and asked == [[t, t] for t in scheduler.timesteps(steps)[:-1]]
    assert all(torch.equal(x_t, then) for x_t, then in seen)        # not overwritten by a later step
    assert torch.equal(seen[-1][0], draw(scheduler, wavy, steps=steps, guidance_scale=1))
    assert seen[-1][0].abs().max() <= 1


@pytest.mark.parametrize("steps", [2, 1000])
def test_sampling_computes_no_gradient_and_leaves_that_of_others_alone(scheduler, unet, steps):
    for x_t in way(scheduler, unet, steps=steps):
        assert not x_t.requires_grad and torch.is_grad_enabled()
        break


# ---------------------------------------------------------------------------------------------- guidance

def told_apart(x, t, context, mask):
    """A network whose answer depends on the caption: 0.3 of `wavy` if it is asked with one, 0.2 without."""
    return wavy(x, t, None, None) * torch.where(mask.all(dim=1), 0.3, 0.2)[:, None, None, None]


@pytest.mark.parametrize("guidance_scale, factor", [(0, 0.2), (0.5, 0.25), (1, 0.3), (2.5, 0.45), (7, 0.9)])
def test_guided_pictures_are_those_of_the_network_that_guidance_makes(scheduler, guidance_scale, factor):
    """CFG Eq. 6 in every step: 0.2 + scale (0.3 - 0.2)."""
    def guided(x, t, context, mask):
        return factor * wavy(x, t, None, None)
    found = draw(scheduler, told_apart, steps=1000, guidance_scale=guidance_scale)
    assert (found - draw(scheduler, guided, steps=1000, guidance_scale=1)).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [5, 10, 50])
@pytest.mark.parametrize("guidance_scale, factor, factor_at_the_end", [
    (0, 0.2, 0.2), (0.5, 0.25, 0.25), (1, 0.3, 0.3), (2.5, 0.45, 0.3), (7, 0.9, 0.3)])
def test_few_guided_steps_end_with_plain_ones(scheduler, steps, guidance_scale, factor, factor_at_the_end):
    """No extrapolation takes the difference of a guided and a plain estimate: where guidance ends, there is none."""
    x, generators = torch.randn(2, 3, 8, 8, generator=generator_for(2)), [generator_for(3, i) for i in range(2)]
    times, before, guidance_ended = scheduler.timesteps(steps), None, False
    for t, s in zip(times, times[1:]):
        guided = t > GUIDANCE_MIN_T
        estimate = (factor if guided else factor_at_the_end) * wavy(x, torch.tensor([t, t]), None, None)
        estimate = middle = estimate.clamp(-1, 1)
        ends_here = not guided and before is not None and before[0] > GUIDANCE_MIN_T and factor != factor_at_the_end
        guidance_ended |= ends_here
        if before is not None and s > 0 and not ends_here:
            middle = scheduler.extrapolate(estimate, before[1], before[0], t, s)
        x = scheduler.step(middle, x, t, s, noise_like(x, generators))
        before = t, estimate
    assert guidance_ended == (factor != factor_at_the_end)
    assert (draw(scheduler, told_apart, steps=steps, guidance_scale=guidance_scale) - x).abs().max() < 1e-4


def test_guidance_is_the_papers_equation_in_epsilon(scheduler):
    """CFG Eq. 6, (1 + w) epsilon(caption) - w epsilon(no caption), with w = scale - 1 and DDPM's x_t(x_0, epsilon)."""
    x_t, x_0, x_0_empty = 0.2 * torch.randn(3, 1, 3, 8, 8, dtype=torch.float64, generator=generator_for("guided"))
    for t in (1, 300, 700, 950):
        found = scheduler.predict(lambda x, t, answer: answer, x_t, t, [x_0], [x_0_empty], 1.5)
        signal, noise = scheduler.alpha_bar[t] ** 0.5, (1 - scheduler.alpha_bar[t]) ** 0.5
        epsilon, epsilon_empty = ((x_t - signal * answer) / noise for answer in (x_0, x_0_empty))
        epsilon = (1 + 0.5) * epsilon - 0.5 * epsilon_empty
        assert (found - ((x_t - noise * epsilon) / signal).clamp(-1, 1)).abs().max() < 1e-9


def test_an_early_network_answers_in_place_of_the_empty_caption(scheduler):
    x_t, x_0, empty = 0.1 * torch.randn(3, 1, 3, 8, 8, dtype=torch.float64, generator=generator_for("early"))
    found = scheduler.predict(lambda x, t, answer: answer, x_t, 500, [x_0], [empty], 3, lambda x, t, answer: answer / 2)
    assert torch.allclose(found, (empty / 2 + 3 * (x_0 - empty / 2)).clamp(-1, 1), atol=1e-12)


@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_guidance_away_from_the_network_itself_is_cfg_bit_for_bit(scheduler, steps):
    cfg = draw(scheduler, told_apart, steps=steps)
    assert torch.equal(cfg, draw(scheduler, told_apart, steps=steps, early=told_apart))
    assert not torch.equal(cfg, draw(scheduler, told_apart, steps=steps, early=wavy))


@pytest.mark.parametrize("steps", [3, 1000])
def test_guidance_scale_1_asks_for_the_caption_alone(scheduler, steps):
    """So its pictures are those of plain conditional sampling, bit for bit."""
    asked = []

    def network(x, t, context, mask):
        asked.append((context, mask))
        return torch.zeros_like(x)
    draw(scheduler, network, steps=steps, guidance_scale=1)
    text = torch.randn(2, 3, 24, generator=generator_for(1))
    assert len(asked) == steps and all(torch.equal(context, text) and mask.all() for context, mask in asked)


@pytest.mark.parametrize("steps", [10, 1000])
def test_guidance_scale_0_draws_as_the_network_does_without_a_caption(scheduler, unet, steps):
    """Bit for bit, and with the empty caption that `sample` was given."""
    if steps == 1000:
        unet = told_apart  # a real network would take a minute

    def without(x, t, context, mask):
        return unet(x, t, torch.zeros_like(context), torch.tensor([[True, False, False]] * len(x)))
    assert torch.equal(draw(scheduler, unet, steps=steps, guidance_scale=0),
                       draw(scheduler, without, steps=steps, guidance_scale=1))


@pytest.mark.parametrize("steps", [10, 1000])
def test_a_step_asks_the_same_network_with_the_caption_and_without(scheduler, steps):
    """In one call or two, in either order; x_t and t are the same. Few steps end with the caption alone."""
    asked = []

    def network(*question):
        asked.extend(tuple(tuple(part.flatten().tolist()) for part in row) for row in zip(*question))
        return torch.zeros_like(question[0])
    draw(scheduler, network, B=1, steps=steps, guidance_scale=3)
    with_caption = [row[:2] for row in asked if all(row[3])]
    without = [row[:2] for row in asked if row[2:] == ((0.0,) * 72, (True, False, False))]
    guided_until = 0 if steps == 1000 else GUIDANCE_MIN_T
    assert len(with_caption) == steps and without == [(x_t, t) for x_t, t in with_caption if t[0] > guided_until]
    assert len(asked) == len(with_caption) + len(without)


# ---------------------------------------------------------------------------------------------- what sampling comes to

@pytest.mark.parametrize("steps", [10, 1000])
def test_a_network_that_knows_the_picture_brings_it_back(scheduler, steps):
    picture = torch.rand(1, 3, 8, 8) * 2 - 1

    def network(x, t, context, mask):
        return picture.expand_as(x)
    assert torch.allclose(draw(scheduler, network, steps=steps), picture.expand(2, -1, -1, -1), atol=1e-3)


@pytest.mark.parametrize("std, steps", [(0.2, 1000), (0.2, 50), (0.05, 50)])
def test_the_sampler_reaches_the_distribution_it_should(scheduler, std, steps):
    """Pixels N(0.3, std^2) have a closed-form best answer; the samples must have their mean and spread.

    A first-order step would miss the spread by 7 % at 50 steps and std 0.2, evenly spaced times by 25 % at 0.05.
    """
    mean = 0.3

    def network(x, t, context, mask):
        signal, noise = scheduler.sqrt_alpha_bar[t], scheduler.sqrt_one_minus_alpha_bar[t]
        return mean + signal * std ** 2 / (signal ** 2 * std ** 2 + noise ** 2) * (x - signal * mean)
    found = draw(scheduler, network, B=8, size=32, steps=steps, guidance_scale=1)
    assert found.mean().item() == pytest.approx(mean, abs=0.01)
    assert found.std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("steps", [4, 1000])
def test_wild_answers_stay_pictures(scheduler, steps):
    """The picture is clipped in every step, so that a network's errors can't pile up."""
    seen = []

    def network(x, t, context, mask):
        seen.append(x.abs().max().item())
        return 1000 * torch.randn(x.shape, generator=generator_for(int(t[0])))
    assert draw(scheduler, network, steps=steps).abs().max() <= 1.001
    assert max(seen) < 8


def test_another_number_of_timesteps_is_a_schedule_of_its_own():
    scheduler = NoiseScheduler(20)
    assert len(scheduler.alpha_bar) == 21 and scheduler.timesteps(20) == list(range(20, -1, -1))
    assert len(list(way(scheduler, wavy, steps=20))) == 20 and len(list(way(scheduler, wavy, steps=19))) == 19


def test_a_pictures_noise_is_its_own_generators():
    x = torch.empty(3, 3, 4, 4)
    together = noise_like(x, [generator_for(i) for i in range(3)])
    assert together.shape == x.shape
    assert all(torch.equal(noise_like(x[:1], [generator_for(i)])[0], together[i]) for i in range(3))


def test_pictures_are_clamped_before_they_become_bytes():
    found = to_uint8(torch.tensor([-1.02, -1.0, 0.0, 1.0, 1.02, 0.999]))
    assert found.tolist() == [0, 0, 128, 255, 255, 255]


def test_generators_follow_from_their_key_alone():
    def draws(*key):
        return torch.rand(4, generator=generator_for(*key)).tolist()
    assert draws(1, 2) == draws(1, 2)
    assert len({tuple(draws(*key)) for key in [(1,), (2,), (1, 2), (2, 1), (1, 2, 3)]}) == 5
    assert draws(0, 2) != draws(0, 2, 0) and draws(0, "step", 1) != draws(0, "order", 1)


# ---------------------------------------------------------------------------------------------- how a script ends

@pytest.mark.parametrize("raised, ended, said", [(UserError("--lr is too high"), SystemExit, "error: --lr is too high"),
                                                 (KeyboardInterrupt(), SystemExit, "130"),
                                                 (RuntimeError("a bug"), RuntimeError, "a bug"),
                                                 (SystemExit(143), SystemExit, "143")])
def test_a_users_mistake_is_one_line_and_a_bug_shows_where_it_is(monkeypatch, raised, ended, said):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO()))

    def main():
        raise raised
    with pytest.raises(ended) as end:
        sample_diffusion.run(main)
    assert str(end.value) == said


def test_what_a_script_says_is_a_line_each(capsys):
    sample_diffusion.say("trained for 3 epochs", ROOT)
    assert capsys.readouterr().out == f"trained for 3 epochs\n{ROOT}\n"


def test_nobody_reading_the_output_ends_no_run():
    """As with `| head -1`: the reading end of the pipe is closed while the script goes on."""
    code = """
import sys
sys.stdin.readline()
from sample_diffusion import run, say
def main():
    say("a first line", "b" * 100_000)
    say("c")
    print("and a plain print", flush=True)
    sys.stderr.write("went on")
run(main)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == "went on"
        assert process.wait(60) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no file here that is always full")
def test_a_full_disk_behind_the_output_ends_no_run():
    """As with `> log.txt`."""
    code = "from sample_diffusion import run, say; run(lambda: [say('a line'), say('another'), print('and a print')])"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
