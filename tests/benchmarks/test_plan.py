"""The plan for large models: parameters as published, memory as measured on a small one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from hfgen import VARTransformer
from support.benchmark_modules import benchmark_modules

ROOT = Path(__file__).resolve().parents[2]
# Millions of trained parameters as published: TiTok-L's encoder (303.4) and decoder (306.8) with latents and codes.
PUBLISHED = {"var-d30": 2010.0, "titok-l": 303.4 + 306.8, "llamagen-3b": 3100, "mmdit-8b": 8060}


@pytest.fixture(scope="module")
def plan():
    return benchmark_modules("plan")["plan"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(plan, name):
    assert plan.MODELS[name]().parameters / 1e6 == pytest.approx(PUBLISHED[name], rel=1.5e-3)


def small_model(num_layers: int) -> VARTransformer:
    return VARTransformer(
        num_codes=64,
        code_dim=8,
        num_classes=10,
        num_layers=num_layers,
        num_attention_heads=4,
        attention_head_dim=64,
        patch_nums=(1, 2, 3, 4, 5, 6, 8),
    ).train()


def saved_bytes(model: VARTransformer, batch: int, *, checkpointing: bool) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the parameters; shared memory counts once."""
    if checkpointing:
        model.enable_gradient_checkpointing()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        labels = torch.zeros(batch, dtype=torch.long)
        loss = model(torch.randn(batch, model.num_tokens - 1, 8), labels).logits.logsumexp(-1).sum()
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_a_block_are_those_measured(plan, checkpointing):
    """Within 5 %: masks and numbers per token or head are left out of the formula."""
    batch, added = 4, 2
    few, many = (saved_bytes(small_model(layers), batch, checkpointing=checkpointing) for layers in (2, 2 + added))
    width, tokens = 256, small_model(1).num_tokens
    sizes = {"parameters": 0, "frozen": 0, "width": width, "tokens": tokens, "head_values": 0}
    formula = [
        plan.Plan(layers=layers, block_values=plan.VAR_BLOCK_VALUES, **sizes).activation_bytes(batch, checkpointing, 4)
        for layers in (2, 2 + added)
    ]
    assert formula[1] - formula[0] == pytest.approx(many - few, rel=0.05)


def test_operations_are_those_counted(plan):
    recipe = plan.MODELS["var-d30"]()
    with torch.device("meta"):
        model = VARTransformer.from_preset("var-d30").eval()
        latents, labels = torch.zeros(1, recipe.tokens - 1, 32), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, labels)
    assert recipe.flops(False) / 3 == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_sharding_divides_the_state(plan):
    recipe = plan.MODELS["titok-l"]()
    rows = {(p, n): plan.estimate("x", recipe, p, n, 8, 1e15) for p in plan.PARALLELISMS for n in (1, 8, 64)}
    assert rows["DDP", 8].state == rows["DDP", 64].state
    assert rows["FSDP2", 64].state < rows["FSDP2", 8].state < rows["DDP", 8].state
    checkpointed = rows["FSDP2 + checkpointing", 8]
    assert checkpointed.activations < rows["FSDP2", 8].activations / 5
    assert checkpointed.epoch == pytest.approx(rows["FSDP2", 8].epoch * 4 / 3)
    assert rows["DDP", 8].epoch == pytest.approx(8 * rows["DDP", 64].epoch)


def test_the_command_prints_a_table_and_refuses_nonsense(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "plan.py"), "--model", "var-d30", "--gpus", "8"]
    result = subprocess.run([*command, "--json", str(tmp_path / "rows.json")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "| FSDP2 + checkpointing | 8 | 8 |" in result.stdout
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 3
    result = subprocess.run([*command, "--mfu", "40"], capture_output=True, text=True)
    assert result.returncode == 2 and "--mfu is 40.0; it must be in (0, 1]" in result.stderr
