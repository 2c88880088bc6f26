"""Apple's GPU: one training step beside the CPU's, for people who have one; and without one, torch's own table.

    python -m pytest tests/test_mps.py      # on a Mac: seconds. If the step differs, it says which of its numbers do

The table says whether all that is computed could run there: every ATen operation of training steps, validation and
sampling is collected on the CPU while train_diffusion.main runs. Each must have an entry for MPS in
native_functions.yaml, which the torch wheel holds, or be composed of others.
"""
import inspect
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_diffusion as train
from conftest import small_flags
from model import UNet

TABLE = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
COMPOSITE = {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
NOT_ON_MPS = {torch.float64, torch.complex128}
# Torch before 2.13 has GroupNorm's backward on MPS, but composed of other operations by torch.backends.mps: it is
# missing in that torch's table, and nothing else may be
GROUP_NORM = "native_group_norm_backward"
IN_PYTHON = {GROUP_NORM} if f'"{GROUP_NORM}"' in inspect.getsource(torch.backends.mps) else set()


# ---------------------------------------------------------------------------------------------- one training step

# How far two devices may be apart in float32, in relation to the numbers' size. If all layers round by 3 in a million,
# x_0 is 1e-5 apart, gradients are 3e-5 and the step is 0.008, where gradients near 0 change their sign
TOLERANCE = {"x_0": 1e-3, "loss": 1e-3, "gradient": 1e-2, "norm": 1e-3, "clipped gradient": 1e-2, "step": 0.05,
             "EMA": 0.05}


def training_step(device, folder, out):
    """The first step of train_diffusion.main on a device -> {("gradient", a weight's name): numbers on the CPU, ...}.

    The kinds are those of TOLERANCE; weights and EMA are given as how far the step moved them. All that follows from
    the seed is computed on the CPU: every device starts from the same weights and has the same batch.
    """
    class Done(Exception):
        """Raised after the first step, to end the run."""
    seen, weights = {}, {}
    true_loss, true_ema, true_clip = train.diffusion_loss, train.update_ema, torch.nn.utils.clip_grad_norm_

    def note(kind, **tensors):
        """Keep a copy of each tensor."""
        seen.update({(kind, name): tensor.detach().cpu().clone() for name, tensor in tensors.items()})

    def diffusion_loss(unet, *batch):
        """Note the starting weights, the network's answer and the loss."""
        weights.update(unet.named_parameters())
        note("start", **weights)
        unet.register_forward_hook(lambda module, args, x_0: note("x_0", network=x_0))
        loss = true_loss(unet, *batch)
        note("loss", pictures=loss)
        return loss

    def clip_grad_norm_(parameters, max_norm):
        """Note the gradients before and after, and their norm."""
        note("gradient", **{name: weight.grad for name, weight in weights.items()})
        norm = true_clip(parameters, max_norm)
        note("norm", gradients=norm)
        note("clipped gradient", **{name: weight.grad for name, weight in weights.items()})
        return norm

    def update_ema(ema, unet, step):
        """Note how far both optimizers moved the weights, and how far the EMA followed."""
        true_ema(ema, unet, step)
        for kind, network in ("step", unet), ("EMA", ema):
            note(kind, **{name: weight.detach().cpu() - seen["start", name]
                          for name, weight in network.named_parameters()})
        raise Done
    flags = small_flags(folder, out)
    flags[flags.index("--device") + 1] = device
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Done):
        patch.setattr(train, "diffusion_loss", diffusion_loss)
        patch.setattr(train, "update_ema", update_ema)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm_)
        train.main([*map(str, flags), "--epochs", "1", "--precision", "fp32"])
    return seen


def differences(expected, found):
    """What `training_step` gave on two devices -> a line for each tensor that differs: what it is, and by how much."""
    assert expected.keys() == found.keys()
    lines = []
    for (kind, name), numbers in expected.items():
        size = max(numbers.norm().item(), found[kind, name].norm().item(), 1e-30)
        apart = (found[kind, name] - numbers).norm().item() / size
        if not apart <= TOLERANCE.get(kind, 0):  # the starting weights are equal; nan is a difference
            lines.append(f"{kind} of {name}: {apart:.2g} of its size apart")
    return lines


@pytest.fixture(scope="module")
def on_cpu(folder, tmp_path_factory):
    """The step on the CPU."""
    return training_step("cpu", folder, tmp_path_factory.mktemp("cpu"))


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU here")
def test_a_training_step_on_mps_is_that_of_the_cpu(on_cpu, folder, tmp_path):
    """Please report the names if it fails: they say where to look."""
    assert differences(on_cpu, training_step("mps", folder, tmp_path)) == []


def test_the_step_holds_all_that_a_step_computes(on_cpu):
    names = {name for name, _ in UNet(image_size=16, channels=32).named_parameters()}
    for kind in ("start", "gradient", "clipped gradient", "step", "EMA"):
        assert {name for of, name in on_cpu if of == kind} == names
    assert len(on_cpu) == 5 * len(names) + 3
    assert on_cpu["x_0", "network"].shape == (4, 3, 16, 16) and on_cpu["loss", "pictures"].shape == (4,)
    assert all(numbers.isfinite().all() for numbers in on_cpu.values())
    assert all(numbers.norm() > 0 for (kind, _), numbers in on_cpu.items() if kind != "start")


def test_the_same_step_on_the_cpu_again_is_equal(on_cpu, folder, tmp_path):
    again = training_step("cpu", folder, tmp_path)
    assert all(torch.equal(numbers, again[key]) for key, numbers in on_cpu.items())
    assert differences(on_cpu, again) == []


def test_rounding_is_no_difference(on_cpu, folder, tmp_path, monkeypatch):
    """All that a layer gives is off by 3 in a million, and weights lie in memory as on MPS, without channels_last."""
    def place(network, device):
        for module in network.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm)):
                module.register_forward_hook(lambda module, args, out: out * (1 + 3e-6 * torch.randn_like(out)))
        return network.to(device)
    monkeypatch.setattr(train, "place", place)
    found = training_step("cpu", folder, tmp_path)
    assert not torch.equal(on_cpu["x_0", "network"], found["x_0", "network"])
    assert differences(on_cpu, found) == []


def plant_a_gradient(patch, names):
    """One gradient is 1.2 times too long. (No optimizer would show it: their steps don't follow its length.)"""
    def place(network, device):
        network.up2.resnet.time_proj.weight.register_hook(lambda gradient: 1.2 * gradient)
        return true_place(network, device)
    true_place = train.place
    patch.setattr(train, "place", place)
    return ["gradient of up2.resnet.time_proj.weight", "clipped gradient of up2.resnet.time_proj.weight"]


def plant_a_norm(patch, names):
    """The gradients are clipped as they should be, by a norm that is told wrong."""
    true_clip = torch.nn.utils.clip_grad_norm_
    patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: 1.01 * true_clip(*args))
    return ["norm of gradients"]


def plant_a_step_of_muon(patch, names):
    """One matrix moves a tenth too far."""
    true_orthogonalize = train.orthogonalize
    patch.setattr(train, "orthogonalize", lambda x: true_orthogonalize(x) * (1.1 if x.shape == (3, 32 * 9) else 1))
    return ["step of conv_out.weight", "EMA of conv_out.weight"]


def plant_a_step_of_adamw(patch, names):
    """All that AdamW moves is moved a tenth too far."""
    patch.setattr(train, "ADAMW_LR_RATIO", 1.1 * train.ADAMW_LR_RATIO)
    moved = [name for name, weight in names.items() if weight.ndim == 1 or "time" in name]
    return [f"{kind} of {name}" for kind in ("step", "EMA") for name in moved]


def plant_an_ema(patch, names):
    """The EMA goes half of its way."""
    true_ema = train.update_ema
    patch.setattr(train, "update_ema", lambda ema, unet, step: true_ema(ema, unet, 10))
    return [f"EMA of {name}" for name in names]


@pytest.mark.parametrize("plant", [plant_a_gradient, plant_a_norm, plant_a_step_of_muon, plant_a_step_of_adamw,
                                   plant_an_ema])
def test_a_difference_is_named(on_cpu, folder, tmp_path, monkeypatch, plant):
    """That one and no other."""
    expected = plant(monkeypatch, {name: weight for (kind, name), weight in on_cpu.items() if kind == "start"})
    lines = differences(on_cpu, training_step("cpu", folder, tmp_path))
    assert [line.split(":")[0] for line in lines] == expected


@pytest.mark.parametrize("key, line", [(("x_0", "network"), "x_0 of network: 0.091 of its size apart"),
                                       (("loss", "pictures"), "loss of pictures: 0.091 of its size apart"),
                                       (("start", "conv_in.bias"), "start of conv_in.bias: 0.091 of its size apart")])
def test_a_difference_is_named_with_its_size(on_cpu, key, line):
    assert differences(on_cpu, {**on_cpu, key: 1.1 * on_cpu[key]}) == [line]
    assert differences({**on_cpu, key: 1.1 * on_cpu[key]}, on_cpu) == [line]
    for wrong in (torch.nan, torch.inf):
        broken = on_cpu[key].clone()
        broken[(0,) * broken.ndim] = wrong
        assert differences(on_cpu, {**on_cpu, key: broken}) == [line.replace("0.091", "nan")]


# ---------------------------------------------------------------------------------------------- the table

@cache
def table():
    """{name of an operation: the dispatch keys that it has an entry for}."""
    entries = yaml.load(TABLE.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    by_name = {entry["func"].split("(")[0]: entry for entry in entries}
    keys = {}
    for name, entry in by_name.items():
        dispatch = by_name[entry.get("structured_delegate", name)].get("dispatch", {"CompositeImplicitAutograd": ""})
        keys[name] = {key.strip() for names in dispatch for key in names.split(",")}
        for generated in entry.get("autogen", "").split(","):  # by torchgen, from the operation itself
            keys.setdefault(generated.strip(), keys[name])
    return keys


class Collect(TorchDispatchMode):
    """Within `with`, note every operation, and those that take or give a tensor which MPS does not have."""

    def __init__(self):
        super().__init__()
        self.names, self.wide = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace != "profiler":  # a note for torch.profiler: nothing is computed
            name = func._schema.name.removeprefix("aten::")
            name += f".{func._schema.overload_name}" if func._schema.overload_name else ""
            self.names.add(name)
            if any(isinstance(leaf, torch.Tensor) and leaf.dtype in NOT_ON_MPS
                   for leaf in tree_leaves((args, kwargs, result))):
                self.wide.add(name)
        return result

    def missing(self):
        """The names of the operations that MPS has not."""
        return sorted(name for name in self.names - IN_PYTHON
                      if not table().get(name, set()) & {"MPS", *COMPOSITE})


@pytest.fixture(scope="module")
def collected(folder, tmp_path_factory):
    """All operations of a run, from its first step on."""
    seen, loss = Collect(), train.diffusion_loss
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        def first_loss(*inputs):
            patch.setattr(train, "diffusion_loss", loss)
            stack.enter_context(seen)
            return loss(*inputs)
        patch.setattr(train, "diffusion_loss", first_loss)
        patch.setattr(train, "draw", partial(train.draw, steps=3))  # a first, a middle and a last one: as in more
        train.main([*map(str, small_flags(folder, tmp_path_factory.mktemp("mps"))), "--epochs", "1",
                    "--precision", "fp32"])
    return seen


def test_every_operation_of_a_run_is_there_on_mps(collected):
    assert {"convolution", "convolution_backward", "_softmax", "linalg_vector_norm", "_fused_adamw_", "lerp_.Scalar",
            "randn.generator", "clamp"} <= collected.names  # forward, backward, clipping, AdamW, EMA, ...
    assert collected.missing() == []


def test_no_tensor_of_a_run_is_float64(collected):
    assert collected.wide == set()


@pytest.mark.parametrize("foreach", [True, False])
def test_clipping_is_there_on_mps_by_either_of_torchs_ways(foreach):
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    sum(parameter.sum() for parameter in parameters).backward()
    with Collect() as seen:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=foreach)
    assert len(seen.names) > 2 and seen.missing() == []


def test_the_fused_adamw_is_there_on_mps():
    """Named in the table itself, so that no composition of other operations is meant."""
    assert "MPS" in table()["_fused_adamw_"]


def test_group_norms_backward_is_there_on_mps_in_one_of_two_ways():
    assert ("MPS" in table()[GROUP_NORM]) != (GROUP_NORM in IN_PYTHON)


def test_an_operation_that_mps_has_not_is_found():
    with Collect() as seen:
        torch.linalg.eig(torch.eye(3))
    seen.names.add("an_operation_of_no_table")
    assert seen.missing() == ["an_operation_of_no_table", "linalg_eig"]


@pytest.mark.parametrize("compute", [lambda: torch.ones(2).double(), lambda: torch.zeros(2, dtype=torch.float64) + 1,
                                     lambda: torch.ones(2, dtype=torch.complex128).real])
def test_a_float64_tensor_is_found(compute):
    with Collect() as seen:
        compute()
    assert seen.wide
