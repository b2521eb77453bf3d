"""The networks of DiT and SiT against the official code: one test for each of their outputs in the golden case.

Diffusion and interpolants are read by test_dit_diffusion.py.
"""

import re
from functools import cache

import pytest
import torch

from hfgen.conversion import load_original
from hfgen.sampling.guidance import guide
from support.golden import assert_matches, case_path, output_names, read_case

SYSTEM = "dit"
GUIDED_CHANNELS = 3  # all channels but these are those of the conditional and the unconditional half


@cache
def model(part):
    case = read_case(SYSTEM)
    return load_original(part, case.states[part], original_config=case.config[part])


@cache
@torch.no_grad()
def traced():
    """A forward pass of DiT and what is inside it."""
    inputs, transformer = read_case(SYSTEM).inputs, model("dit")
    results = {}
    hooks = [transformer.time_embed.register_forward_hook(lambda _, args, out: results.update(t_embed=out))]
    for index, block in enumerate(transformer.blocks):

        def keep(_, args, out, index=index):
            results[f"block.{index}"] = out
            results["c"] = args[1]

        hooks.append(block.register_forward_hook(keep))
    results["forward"] = transformer(inputs["x"], inputs["t"], inputs["y"]).sample
    for hook in hooks:
        hook.remove()
    return results


@torch.no_grad()
def forward_cfg():
    inputs, transformer = read_case(SYSTEM).inputs, model("dit")
    labels = torch.cat([inputs["y"], torch.full_like(inputs["y"], transformer.unconditional_label)])
    output = transformer(inputs["x"].repeat(2, 1, 1, 1), inputs["t"].repeat(2), labels).sample
    guided = guide(*output[:, :GUIDED_CHANNELS].chunk(2), inputs["cfg_scale"].item())
    return torch.cat([guided.repeat(2, 1, 1, 1), output[:, GUIDED_CHANNELS:]], dim=1)


@torch.no_grad()
def sit_forward():
    """The class is called with 1000 sigma, where 1 is noise, and predicts noise minus data."""
    inputs = read_case(SYSTEM).inputs
    return -model("sit")(inputs["sit.x"], 1000 * (1 - inputs["sit.t"]), inputs["sit.y"]).sample


CHECKS = {
    r"(t_embed|c|block\.\d+|forward)": lambda name: traced()[name],
    r"forward_cfg": lambda: forward_cfg(),
    r"sit\.forward": lambda: sit_forward(),
}
OUTPUTS = [name for name in output_names(SYSTEM) if any(re.fullmatch(pattern, name) for pattern in CHECKS)]


@pytest.mark.parametrize("name", OUTPUTS)
def test_output(name):
    ((check, found),) = [(check, m) for pattern, check in CHECKS.items() if (m := re.fullmatch(pattern, name))]
    assert_matches(check(*found.groups()), read_case(SYSTEM).outputs[name])


def test_every_part_was_checked():
    assert OUTPUTS, f"there are no outputs of the networks in a golden case at {case_path(SYSTEM)}"
    for part, output in (("dit", "forward"), ("sit", "sit.forward")):
        assert (part in read_case(SYSTEM).states) == (output in OUTPUTS)
