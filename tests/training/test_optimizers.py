"""The optimizers, and how forward passes are computed: precision, recomputation, compilation."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.utils.checkpoint import checkpoint

from hfgen.training import Phase, Trainer
from hfgen.training import trainer as trainer_module
from hfgen.training.optimizers import MuonWithAdamW, make_optimizers, set_hyperparameters
from hfgen.training.param_groups import parameter_groups, split_hidden_matrices
from hfgen.training.precision import compile_blocks


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.down(torch.tanh(self.up(self.norm(hidden_states))))


class BlockModel(ModelMixin, ConfigMixin):
    _supports_gradient_checkpointing = True
    _repeated_blocks = ["Block"]

    @register_to_config
    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.proj_in, self.proj_out = nn.Linear(12, width), nn.Linear(width, 12)
        self.table = nn.Parameter(0.1 * torch.randn(1, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden_states = self.proj_in(pixels) + self.table
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = checkpoint(block, hidden_states, use_reentrant=False)
            else:
                hidden_states = block(hidden_states)
        return self.proj_out(hidden_states)


def _fit(toy, folder, *, on_step=None, width: int = 8, depth: int = 2, **changes):
    trainer = Trainer(toy.config(folder, **changes))
    task = toy.Task(False, *([on_step] if on_step else []))
    task.modules["model"] = BlockModel(width, depth)
    return trainer, trainer.fit(task, toy.Data())


def _stop(step: int, block: int) -> None:
    if step == 4:
        os.kill(os.getpid(), signal.SIGTERM)


def _assert_resume_is_exact(toy, tmp_path, **changes) -> Trainer:
    straight, _ = _fit(toy, tmp_path / "a", **changes)
    _, finished = _fit(toy, tmp_path / "b", on_step=_stop, **changes)
    assert not finished
    resumed, finished = _fit(toy, tmp_path / "b", resume="latest", **changes)
    assert finished
    for name, module in straight._components().items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, resumed._components()[name].state_dict()[key]), (name, key)
    assert toy.records(tmp_path / "a") == toy.records(tmp_path / "b")
    return resumed


def _losses(toy, folder) -> list[float]:
    return [record["model/loss"] for record in toy.records(folder) if "model/loss" in record]


# --------------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [("adamw", torch.optim.AdamW), ("adafactor", torch.optim.Adafactor), ("muon", MuonWithAdamW)],
)
def test_every_optimizer_learns_and_resumes_exactly(toy, tmp_path, optimizer, kind):
    resumed = _assert_resume_is_exact(toy, tmp_path, optimizer=optimizer, weight_decay_end=0.2)
    assert type(resumed.optimizers["model"]) is kind
    losses = _losses(toy, tmp_path / "a")
    assert losses[-1] < losses[0]


def test_8bit_adamw_resumes_exactly(toy, tmp_path):
    """Without the compilation of torchao's update, which takes minutes on a CPU."""
    pytest.importorskip("torchao.optim")
    with torch.compiler.set_stance("force_eager"):
        resumed = _assert_resume_is_exact(toy, tmp_path, optimizer="adamw8bit", width=64, weight_decay_end=0.2)
    optimizer = resumed.optimizers["model"]
    state = optimizer.state[resumed.models["model"].blocks[0].up.weight]
    assert type(state["exp_avg"]).__name__ == "OptimState8bit"
    # A number would be compiled into the update and make a schedule compile it again at every step.
    for group in optimizer.param_groups:
        assert isinstance(group["lr"], torch.Tensor) and isinstance(group["weight_decay"], torch.Tensor)
    assert [round(float(group["weight_decay"]), 4) for group in optimizer.param_groups] == [0.2, 0.0]


def test_8bit_adamw_without_its_package_says_what_to_install(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ImportError, match="--optimizer adamw8bit needs torchao.*pip install .hfgen\\[adamw8bit"):
        _fit(toy, tmp_path, optimizer="adamw8bit")


def test_hidden_matrices_are_the_linear_weights_of_blocks():
    model = BlockModel()
    groups = parameter_groups([model], no_decay=("down",))
    matrices, others = split_hidden_matrices(groups, [model])
    assert [(group["decay"], [tuple(p.shape) for p in group["params"]]) for group in matrices] == [
        (True, [(16, 8)] * 2),
        (False, [(8, 16)] * 2),
    ]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for group in others if group["decay"] for p in group["params"]}
    assert decayed == {"proj_in.weight", "proj_out.weight", "table"}
    assert sum(len(group["params"]) for group in [*matrices, *others]) == len(list(model.parameters()))


@pytest.mark.parametrize("ratio", [1.0, 0.125])
def test_muon_is_torchs_muon_beside_torchs_adamw(ratio, toy, tmp_path):
    torch.manual_seed(0)
    model, twin = BlockModel(), BlockModel()
    twin.load_state_dict(model.state_dict())
    config = toy.config(tmp_path, optimizer="muon", weight_decay=0.1, adamw_ratio=ratio)
    phase = Phase(("model",))
    ours = make_optimizers({"model": phase}, {"model": model}, config, torch.device("cpu"))["model"]
    hidden = [block.up.weight for block in twin.blocks] + [block.down.weight for block in twin.blocks]
    rest = [p for p in twin.parameters() if not any(p is matrix for matrix in hidden)]
    matrices = [p for p in rest if p.ndim > 1]
    vectors = [p for p in rest if p.ndim <= 1]
    muon = torch.optim.Muon(hidden, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    for step in range(3):
        for network in (model, twin):
            network.zero_grad()
            network(torch.ones(2, 12)).square().mean().backward()
        set_hyperparameters(ours, phase, config, step)
        for optimizer, share in ((muon, 1.0), (adamw, ratio)):
            for group in optimizer.param_groups:
                group["lr"] = ours.param_groups[0]["lr"] * share
            optimizer.step()
        ours.step()
    for expected, actual in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, actual)


def test_muon_without_hidden_matrices_is_an_error(toy, tmp_path):
    with pytest.raises(ValueError, match="--optimizer muon.*ToyModel has none; use adamw"):
        toy.fit(toy.config(tmp_path, optimizer="muon"))


def test_muon_leaves_a_phase_without_blocks_to_adamw(toy, tmp_path):
    models = {"model": BlockModel(), "critic": toy.Model()}
    phases = {name: Phase((name,)) for name in models}
    config = toy.config(tmp_path, optimizer="muon")
    optimizers = make_optimizers(phases, models, config, torch.device("cpu"))
    assert {name: type(optimizer) for name, optimizer in optimizers.items()} == {
        "model": MuonWithAdamW,
        "critic": torch.optim.AdamW,
    }


def test_phases_set_rate_and_decay_and_vectors_do_not_decay(toy, tmp_path):
    config = toy.config(tmp_path, learning_rate=1.0, warmup_steps=0, lr_schedule="constant", weight_decay=0.1)
    phase = Phase(("model",), learning_rate=0.5, weight_decay=0.3, no_decay=("table",))
    model = BlockModel()
    optimizer = make_optimizers({"model": phase}, {"model": model}, config, torch.device("cpu"))["model"]
    set_hyperparameters(optimizer, phase, config, 3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.3), (0.5, 0.0)]
    exempt = {id(parameter) for parameter in optimizer.param_groups[1]["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in exempt and p.ndim > 1} == {"table"}


# ---------------------------------------------------------------------------------------------------------- precision


def test_bf16_trains_and_resumes_exactly(toy, tmp_path):
    resumed = _assert_resume_is_exact(toy, tmp_path, mixed_precision="bf16")
    losses = _losses(toy, tmp_path / "a")
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in resumed.models["model"].parameters()} == {torch.float32}
    _fit(toy, tmp_path / "float32")
    assert losses != _losses(toy, tmp_path / "float32")
    assert losses == pytest.approx(_losses(toy, tmp_path / "float32"), rel=0.05)


def test_fp16_skips_overflows_lowers_its_scale_and_resumes_exactly(toy, tmp_path, monkeypatch):
    """The scaler is the same on a CPU, where fp16 is refused only because it is slow."""
    monkeypatch.setattr(trainer_module, "resolve_mixed_precision", lambda requested, device: "fp16")
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**24, enabled=enabled))
    resumed = _assert_resume_is_exact(toy, tmp_path)
    skipped = toy.records(tmp_path / "a")[-2]["skipped_steps"]
    assert 0 < skipped < 8
    assert resumed.scaler.get_scale() == 2.0 ** (24 - skipped)
    assert {int(state["step"]) for state in resumed.optimizers["model"].state.values()} == {8 - skipped}


# ------------------------------------------------------------------------------------- checkpointing and compilation


def test_gradient_checkpointing_changes_nothing_but_memory(toy, tmp_path):
    plain, _ = _fit(toy, tmp_path / "plain")
    saving, _ = _fit(toy, tmp_path / "saving", gradient_checkpointing=True)
    assert saving.models["model"].gradient_checkpointing and not plain.models["model"].gradient_checkpointing
    assert toy.records(tmp_path / "plain") == toy.records(tmp_path / "saving")
    # What is recomputed is no work of the model.
    assert saving.throughput.flops_per_image == plain.throughput.flops_per_image > 0


@pytest.mark.parametrize("flag", ["gradient_checkpointing", "compile"])
def test_a_model_that_cannot_is_an_error(toy, tmp_path, flag):
    with pytest.raises(ValueError, match=f"--{flag}: ToyModel .*drop the flag"):
        toy.fit(toy.config(tmp_path, **{flag: True}))


def test_compiled_blocks_learn_the_same_under_the_same_names(toy, tmp_path, monkeypatch):
    """With a backend that does not generate code, which alone would take half a minute."""
    compile_repeated_blocks = BlockModel.compile_repeated_blocks
    monkeypatch.setattr(
        BlockModel,
        "compile_repeated_blocks",
        lambda self, **options: compile_repeated_blocks(self, backend="eager", **options),
    )
    plain, _ = _fit(toy, tmp_path / "plain", ema_decay=0.0)
    torch._dynamo.utils.counters.clear()
    compiled = _assert_resume_is_exact(toy, tmp_path, compile=True, ema_decay=0.0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert _losses(toy, tmp_path / "a") == pytest.approx(_losses(toy, tmp_path / "plain"), rel=1e-5)
    assert compiled.models["model"].state_dict().keys() == plain.models["model"].state_dict().keys()
    loaded = BlockModel.from_pretrained(tmp_path / "b" / "checkpoint-8" / "model")
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, compiled.models["model"].state_dict()[key]), key


def test_blocks_with_constants_of_their_own_compile(monkeypatch):
    """As drop path gives each block another rate: more graphs than torch compiles by default."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch._dynamo.reset()
    model = BlockModel(depth=11)
    for index, block in enumerate(model.blocks):
        block.scale = 1.0 + index
    monkeypatch.setattr(Block, "forward", lambda self, hidden_states: hidden_states * self.scale)
    expected = model(torch.ones(2, 12))
    compile_repeated_blocks = model.compile_repeated_blocks
    model.compile_repeated_blocks = lambda **options: compile_repeated_blocks(backend="eager", **options)
    compile_blocks({"model": model}, required=("model",))
    assert torch.equal(model(torch.ones(2, 12)), expected)
