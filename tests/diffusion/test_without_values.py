"""Networks without values are those with values, and cost no import of torch's compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from fewstep.diffusion.without_values import without_values
from tests.networks import NETS


@pytest.mark.parametrize("name", NETS)
def test_names_shapes_and_types_are_those_of_the_network_with_values(name: str) -> None:
    state = torch.get_rng_state()
    with without_values():
        empty = NETS[name]().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    full = NETS[name]().state_dict()
    assert [(k, v.shape, v.dtype) for k, v in empty.items()] == [
        (k, v.shape, v.dtype) for k, v in full.items()
    ]
    assert {str(v.device) for v in empty.values()} == {"meta"}
    assert {str(v.device) for v in full.values()} == {"cpu"}


def test_it_ends_with_the_block() -> None:
    generator = torch.Generator().manual_seed(0)
    with without_values():
        assert torch.rand(2, 3, generator=generator).is_meta
        assert torch.randn((2, 3), dtype=torch.float64).dtype == torch.float64
        filled = nn.init.normal_(torch.zeros(2, device="cpu"))
        assert filled.tolist() == torch.zeros(2, device="cpu").normal_().tolist() == [0.0, 0.0]
    assert torch.rand(2).device.type == "cpu"
    assert torch.zeros(2).normal_().abs().min() > 0


def test_no_compiler_is_imported() -> None:
    """The bare device imports one, in the same network; that is the control."""
    code = (
        "import sys, torch\n"
        "from fewstep.diffusion.without_values import without_values\n"
        "from tests.networks import NETS\n"
        "for name in {*NETS} - {'adapted'}:  # whose weights the test itself stirs\n"
        "    with without_values():\n"
        "        NETS[name]()\n"
        "print({'sympy', 'torch._dynamo'} & {*sys.modules})\n"
        "with torch.device('meta'):\n"
        "    NETS['mlp']()\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["set()", "True"]
