"""Apple's GPU, without one: torch's own table of operations says whether all that is computed could run there.

Every ATen operation of training steps, validation and sampling is collected on the CPU while train_diffusion.main runs.
Each must have an entry for MPS in native_functions.yaml, which the torch wheel holds, or be composed of others.
"""
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_diffusion as train
from conftest import small_flags

TABLE = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
COMPOSITE = {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
NOT_ON_MPS = {torch.float64, torch.complex128}


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
        return sorted(name for name in self.names if not table().get(name, set()) & {"MPS", *COMPOSITE})


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
        train.main([*map(str, small_flags(folder, tmp_path_factory.mktemp("mps"))), "--epochs", "1",
                    "--precision", "fp32"])
    return seen


def test_every_operation_of_a_run_is_there_on_mps(collected):
    assert {"convolution", "convolution_backward", "_softmax", "linalg_vector_norm", "_fused_adamw_", "lerp_.Scalar",
            "roll", "randn.generator", "clamp"} <= collected.names  # forward, backward, clipping, AdamW, EMA, ...
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
