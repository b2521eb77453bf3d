"""What diffusers offers for every model works on those of hfgen: checkpointing, backends, LoRA, hooks, compilation."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from peft import LoraConfig
from torch import Tensor

import hfgen
from support.instances import MODELS, build_model


def models_with(feature) -> list[str]:
    return [name for name in MODELS if feature(getattr(hfgen, name))]


ATTENTION_MODELS = models_with(lambda model_class: hasattr(model_class, "set_attention_backend"))
FUSABLE_MODELS = models_with(lambda model_class: hasattr(model_class, "fuse_qkv_projections"))
CHECKPOINTING_MODELS = models_with(lambda model_class: model_class._supports_gradient_checkpointing)


@pytest.fixture
def attention_backends():
    """``set_attention_backend`` of one model also sets the default of all others; this restores it."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


def run(name: str, model) -> Tensor:
    with torch.no_grad():
        return MODELS[name].smooth(model, MODELS[name].inputs(2))


def gradients(name: str, model) -> dict[str, Tensor]:
    model.zero_grad()
    outputs = model(**MODELS[name].inputs(2)).to_tuple()
    sum(x.float().square().mean() for x in outputs if isinstance(x, Tensor) and x.requires_grad).backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", CHECKPOINTING_MODELS)
def test_gradient_checkpointing(name):
    model = build_model(name).train()
    expected = gradients(name, model)
    assert expected.keys() == dict(model.named_parameters()).keys(), "parameters without gradient"
    calls = 0

    def checkpoint(function, *inputs):
        nonlocal calls
        calls += 1
        return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)

    model.enable_gradient_checkpointing(checkpoint)
    actual = gradients(name, model)
    assert calls > 1
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ATTENTION_MODELS)
def test_attention_backends_agree(name, attention_backends):
    model = build_model(name)
    model.set_attention_backend("native")
    if any(type(part).__module__.startswith("transformers.") for part in model.modules()):
        with pytest.raises(ValueError, match="attention layers .* are those of transformers"):
            model.set_attention_backend("_native_math")
        return
    expected = run(name, model)
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(run(name, model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FUSABLE_MODELS)
def test_fused_projections_agree(name):
    model = build_model(name)
    expected = run(name, model)
    model.fuse_qkv_projections()
    assert any("to_qkv" in key for key in model.state_dict())
    torch.testing.assert_close(run(name, model), expected, rtol=0, atol=1e-5)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(run(name, model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_lora(name):
    model = build_model(name)
    expected = run(name, model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=list(MODELS[name].lora_targets), init_lora_weights=False))
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora" in key for key in trained)
    adapted = run(name, model)
    assert not torch.allclose(adapted, expected, atol=1e-4)
    model.disable_lora()
    torch.testing.assert_close(run(name, model), expected, rtol=0, atol=0)
    model.enable_lora()
    model.fuse_lora()
    torch.testing.assert_close(run(name, model), adapted, rtol=0, atol=1e-5)
    model.unfuse_lora()
    model.unload_lora()
    torch.testing.assert_close(run(name, model), expected, rtol=0, atol=1e-5)
    assert not any("lora" in key for key in model.state_dict())


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name, case in MODELS.items() for method in case.entry_points]
)
def test_entry_points_wake_an_offloaded_model(name, method):
    class CountingHook(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model = build_model(name)
    hook = CountingHook()
    add_hook_to_module(model, hook)
    with torch.no_grad():
        MODELS[name].entry_points[method](model, MODELS[name].inputs(1))
    assert hook.calls, f"{method} needs apply_forward_hook"


@pytest.mark.parametrize("name", MODELS)
def test_group_offload(name):
    model = build_model(name)
    if not model._supports_group_offloading:
        with pytest.raises(ValueError, match="not support group offloading"):
            model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
        return
    expected = run(name, model)
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(run(name, model), expected)


@pytest.mark.parametrize("name", MODELS)
def test_layerwise_casting(name):
    model = build_model(name)
    expected = run(name, model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in model.parameters())
    error = (run(name, model) - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.3


def test_compiled_blocks():
    # "aot_eager" traces the block as a whole, forward and backward, and leaves out the C++ compiler, which takes a
    # minute here and would test torch.
    model = build_model("VARTransformer", num_layers=1)
    keys = list(model.state_dict())
    expected, expected_gradients = run("VARTransformer", model), gradients("VARTransformer", model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run("VARTransformer", model), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients("VARTransformer", model), expected_gradients, rtol=1e-4, atol=1e-6)
    assert list(model.state_dict()) == keys
