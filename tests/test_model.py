"""model.py: the network, the text encoder, the schedule and the sampler, against independent sources."""
import io
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import model
from model import HEAD_DIM, Attention, UNet, UserError, generator_for, to_uint8


def inputs(B=2, L=5, size=32, dim=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, 3, size, size, generator=g), torch.randint(0, 1000, (B,), generator=g),
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
    assert (unet(x, (t + 300) % 1000, context, mask) - x_0).abs().max() > 1e-3
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


def test_a_size_that_does_not_divide_is_named(unet):
    with pytest.raises(ValueError, match="36x32.*multiple of 8"):
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
    assert states.shape == (3, mask.shape[1], encoder.dim) and states.dtype == torch.float32
    assert mask.sum(1).tolist() == [5, 9, 2]  # each with its start and its end
    assert not states.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    alone, _ = encoder(["a red creature"])
    assert torch.allclose(alone[0], states[0, :5], atol=1e-5)


def test_long_captions_are_cut_with_one_warning(encoder, caplog):
    states, mask = encoder(["a red creature " * 4000, "a blue creature"])
    encoder(["a green creature " * 100])
    assert states.shape[1] == 77
    assert len([r for r in caplog.records if "77 tokens" in r.message]) == 1


# ---------------------------------------------------------------------------------------------- NoiseScheduler

# alpha_bar, and the posterior's variance and two weights, from the betas of diffusers'
# DDPMScheduler(beta_schedule='squaredcos_cap_v2') in float64
EXPECTED = {0: [0.9999587, 0.0, 1.0, 0.0],
            1: [0.9999126, 2.17895e-05, 0.5277814, 0.4722186],
            100: [0.9715757, 0.0005222236, 0.01844986, 0.9815483],
            500: [0.4922852, 0.003146005, 0.004367867, 0.9953563],
            900: [0.02361611, 0.01973224, 0.003138349, 0.9895976],
            998: [2.428767e-06, 0.7499939, 0.002337676, 0.499997],
            999: [2.428736e-09, 0.9989976, 0.001556892, 0.0316225]}


@pytest.mark.parametrize("t", EXPECTED)
def test_the_schedule_has_the_expected_numbers(scheduler, t):
    weight_of_x0, weight_of_xt, std = (scheduler.step(*parts, t, t - 1, z)
                                       for *parts, z in [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
    found = [scheduler.alpha_bars[t], std ** 2, weight_of_x0, weight_of_xt]
    assert found == pytest.approx(EXPECTED[t], abs=1e-6)


def test_the_schedule_is_the_papers_closed_form(scheduler):
    def f(u):  # iDDPM Eq. 17
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    for t in (0, 1, 500, 998):
        assert scheduler.alpha_bars[t] == pytest.approx(f((t + 1) / 1000) / f(0), abs=1e-6)
    assert 1 - scheduler.alpha_bars[999] / scheduler.alpha_bars[998] <= 0.999 + 1e-4
    assert 1 - scheduler.alpha_bars[999] / scheduler.alpha_bars[998] >= 0.998


def test_noise_is_added_as_diffusers_does(scheduler):
    theirs = diffusers_scheduler("DDPMScheduler", 1000)
    x_0, noise, t = torch.rand(50, 3, 8, 8) * 2 - 1, torch.randn(50, 3, 8, 8), torch.arange(50) * 19
    expected = theirs.add_noise(x_0.double(), noise.double(), t)
    assert (scheduler.add_noise(x_0, noise, t) - expected).abs().max() < 1e-5


def test_a_noisy_picture_has_the_variance_of_the_clean_one_and_of_the_noise(scheduler):
    x_0, noise = torch.randn(50, 3, 8, 8), torch.randn(50, 3, 8, 8)
    assert scheduler.add_noise(x_0, noise, torch.arange(50) * 19).var().item() == pytest.approx(1, abs=0.05)


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


@pytest.mark.parametrize("t", [999, 998, 700, 300, 50, 1, 0])
def test_a_ddpm_step_is_that_of_diffusers(scheduler, t):
    theirs = diffusers_scheduler("DDPMScheduler", 1000)
    x_0, x_t, _ = answer_and_picture()
    expected = theirs.step(x_0, t, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
    z = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (scheduler.step(x_0.clamp(-1, 1), x_t, t, t - 1, z) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_a_step_over_several_times_is_that_of_diffusers(scheduler, steps):
    """Its DDIM with eta 1, which draws as much fresh noise as DDPM does."""
    theirs = diffusers_scheduler("DDIMScheduler", steps)
    x_0, x_t, z = answer_and_picture()
    for t in theirs.timesteps.tolist():
        expected = theirs.step(x_0, t, x_t, eta=1.0, use_clipped_model_output=True, variance_noise=z).prev_sample
        found = scheduler.step(x_0.clamp(-1, 1), x_t, t, t - 1000 // steps, z)
        assert (found - expected).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------- sampling

def test_the_times_run_from_pure_noise_towards_zero(scheduler):
    assert scheduler.timesteps(1000) == list(range(999, -1, -1))
    assert scheduler.timesteps(5) == [999, 639, 359, 159, 39]  # 1,000 (n / 5)^2 - 1
    for steps in range(1, 1000):
        times = scheduler.timesteps(steps)
        assert len(times) == steps and times[0] == 999 and times[-1] >= 0
        assert times == sorted(set(times), reverse=True)


def draw(scheduler, network, B=2, L=3, size=32, dim=24, steps=10, guidance_scale=2, on_step=None, guide=None,
         caption_cut=0.5):
    text = torch.randn(B, L, dim, generator=generator_for(1)), torch.ones(B, L, dtype=torch.bool)
    empty = torch.zeros(B, L, dim), torch.tensor([[True] + [False] * (L - 1)] * B)
    noise = torch.randn(B, 3, size, size, generator=generator_for(2))
    return scheduler.sample(network, guide or network, noise, text, empty, [generator_for(3, i) for i in range(B)],
                            steps, guidance_scale, caption_cut, on_step)


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
    theirs.alphas_cumprod = torch.tensor(scheduler.alpha_bars[:-1], dtype=torch.float64)
    theirs.set_timesteps(timesteps=scheduler.timesteps(steps))               # float64: 1 - alpha_bar needs the digits
    x, generator = torch.randn(1, 3, 32, 32, generator=generator_for(2)), generator_for(3, 0)
    for t in theirs.timesteps:
        z = torch.randn(1, 3, 32, 32, generator=generator)
        x = theirs.step(wavy(x, t[None], None, None), t, x, variance_noise=z).prev_sample
    found = draw(scheduler, wavy, B=1, steps=steps, guidance_scale=1)
    assert (found - x).abs().max() < 1e-4


def test_guidance_scale_1_and_all_steps_are_plain_ddpm_bit_for_bit(scheduler):
    plain = draw(scheduler, wavy, steps=1000, guidance_scale=1)
    x = torch.randn(2, 3, 32, 32, generator=generator_for(2))
    generators = [generator_for(3, i) for i in range(2)]
    for t in range(999, -1, -1):  # DDPM Algorithm 2
        z = torch.stack([torch.randn(3, 32, 32, generator=g) for g in generators])
        x = scheduler.step(wavy(x, torch.full((2,), t), None, None).clamp(-1, 1), x, t, t - 1, z)
    assert torch.equal(plain, x)


def test_guidance_scale_1_asks_for_the_caption_alone(scheduler):
    """So its pictures are those of plain conditional sampling, bit for bit."""
    asked = []

    def network(x, t, context, mask):
        asked.append((context, mask))
        return torch.zeros_like(x)
    draw(scheduler, network, steps=3, guidance_scale=1)
    text = torch.randn(2, 3, 24, generator=generator_for(1))
    assert len(asked) == 3 and all(torch.equal(context, text) and mask.all() for context, mask in asked)


@pytest.mark.parametrize("share, kept", [(0, [1, 1]), (0.4, [2, 1]), (0.41, [3, 1]), (1, [5, 2]), (3, [5, 2])])
def test_the_first_tokens_of_a_caption(share, kept):
    mask = torch.arange(6) < torch.tensor([[5], [2]])
    expected = (torch.arange(6) < torch.tensor(kept)[:, None]).tolist()
    assert model.first_tokens(mask, share).tolist() == expected
    assert model.first_tokens(mask, torch.tensor([[share], [share]])).tolist() == expected  # a share for each


@pytest.mark.parametrize("caption_cut", [0, 0.5])
def test_the_caption_comes_word_by_word_if_it_was_so_trained_and_the_guide_never_has_it(scheduler, caption_cut):
    asked, guide_asked, whole = {}, {}, 2 * [[True] * 5]

    def asks(t, mask, by):
        by[int(t[0])] = mask.tolist()
        return torch.zeros(2, 3, 32, 32)
    draw(scheduler, lambda x, t, context, mask: asks(t, mask, asked), L=5, steps=1000, guidance_scale=3.0,
         caption_cut=caption_cut, guide=lambda x, t, context, mask: asks(t, mask, guide_asked))
    assert all(asked[t] == whole for t in range(1000) if caption_cut == 0 or t <= 666)
    if caption_cut:
        tokens = {999: 1, 933: 2, 930: 2, 867: 2, 866: 3, 800: 3, 799: 4, 733: 5, 734: 4}  # of 15 (1 - t / 1000), up
        assert {t: asked[t] for t in tokens} == {t: 2 * [[i < n for i in range(5)]] for t, n in tokens.items()}
    assert guide_asked == {t: 2 * [[True] + [False] * 4] for t in range(50, 1000)}


def test_guided_pictures_are_those_of_the_network_that_guidance_makes(scheduler):
    seen = []

    def network(x, t, context, mask):
        return 0.3 * wavy(x, t, None, None)

    def guide(x, t, context, mask):
        return 0.2 * wavy(x, t, None, None)

    def guided(x, t, context, mask):  # CFG Eq. 6: 0.2 + 2.5 (0.3 - 0.2)
        return wavy(x, t, None, None) * torch.where(t >= 50, 0.45, 0.3)[:, None, None, None]
    found = draw(scheduler, network, steps=5, guidance_scale=2.5, on_step=seen.append, guide=guide)
    expected = draw(scheduler, guided, steps=5, guidance_scale=1)
    assert (found - expected).abs().max() < 1e-5
    assert len(seen) == 5 and all(x_t.shape == found.shape for x_t in seen) and torch.equal(seen[-1], found)


@pytest.mark.parametrize("steps", [10, 1000])
def test_a_network_that_knows_the_picture_brings_it_back(scheduler, steps):
    picture = torch.rand(1, 3, 32, 32) * 2 - 1

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
        signal, noise = scheduler.signal_scale[t], scheduler.noise_scale[t]
        return mean + signal * std ** 2 / (signal ** 2 * std ** 2 + noise ** 2) * (x - signal * mean)
    found = draw(scheduler, network, B=8, steps=steps, guidance_scale=1)
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
                                                 (RuntimeError("a bug"), RuntimeError, "a bug"),
                                                 (SystemExit(143), SystemExit, "143")])
def test_a_users_mistake_is_one_line_and_a_bug_shows_where_it_is(monkeypatch, raised, ended, said):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO()))

    def main():
        raise raised
    with pytest.raises(ended) as end:
        model.run(main)
    assert str(end.value) == said
