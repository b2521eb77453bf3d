"""What every public pipeline promises."""

import inspect
import json

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

import hfgen
from support.instances import PIPELINES, build_pipeline

pytestmark = pytest.mark.parametrize("name", PIPELINES)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def sample(pipeline, name: str, count: int = 2, **arguments) -> Tensor:
    """Images as a tensor; each has its own generator."""
    arguments = {"generator": generators(count), "output_type": "pt", **arguments}
    return pipeline(**PIPELINES[name].condition(count), **arguments).images


def test_save_and_load(name, tmp_path):
    pipeline = build_pipeline(name, **PIPELINES[name].arguments)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == name
    # Loading from the Hub takes every list for a component, so other arguments are stored as something else.
    absent = [None, None]  # what diffusers stores of an optional component that is not there
    lists = {key: value for key, value in index.items() if isinstance(value, list) and value != absent}
    parts = {**PIPELINES[name].components, **PIPELINES[name].schedulers}
    libraries = {part: "hfgen" if part in hfgen.__all__ else "diffusers" for part in parts.values()}
    expected = {component: [libraries[part], part] for component, part in parts.items()}
    for component in PIPELINES[name].tokenizers:
        # The name that every version of transformers knows, whatever it calls the class.
        expected[component] = ["transformers", "PreTrainedTokenizerFast"]
    assert lists == expected
    loaded = type(pipeline).from_pretrained(tmp_path)
    for argument in PIPELINES[name].arguments:
        assert loaded.config[argument] == pipeline.config[argument] is not None
    assert torch.equal(sample(loaded, name), sample(pipeline, name))
    loaded.save_config(tmp_path)
    assert str(tmp_path) not in (tmp_path / "model_index.json").read_text()
    loaded.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "again").rglob("*.json"):  # also those of components, which know where they came from
        assert str(tmp_path) not in file.read_text(), file


def test_components_are_the_constructor_arguments(name):
    pipeline = build_pipeline(name)
    modules = set(inspect.signature(type(pipeline).__init__).parameters) - {"self", *PIPELINES[name].arguments}
    assert pipeline.components.keys() == modules
    assert all(component is getattr(pipeline, key) for key, component in pipeline.components.items())


def test_optional_components_default_to_none(name):
    pipeline = build_pipeline(name)
    parameters = inspect.signature(type(pipeline).__init__).parameters
    assert all(parameters[component].default is None for component in pipeline._optional_components)
    required = pipeline.components.keys() - set(pipeline._optional_components)
    assert all(parameters[component].default is inspect.Parameter.empty for component in required)


def test_from_pipe_shares_the_components(name):
    pipeline = build_pipeline(name)
    other = type(pipeline).from_pipe(pipeline)
    assert other is not pipeline
    assert all(other.components[key] is component for key, component in pipeline.components.items())
    other.set_progress_bar_config(disable=True)
    assert torch.equal(sample(other, name), sample(pipeline, name))


def test_load_with_dtype_and_device_map(name, tmp_path):
    pipeline = build_pipeline(name)
    pipeline.save_pretrained(tmp_path)
    loaded = type(pipeline).from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    for component in PIPELINES[name].components:
        assert {parameter.dtype for parameter in getattr(loaded, component).parameters()} == {torch.bfloat16}
    images = sample(loaded, name)
    assert images.isfinite().all() and images.std() > 0


def test_output_types(name):
    pipeline = build_pipeline(name)
    as_tensor = sample(pipeline, name)
    assert as_tensor.shape[:2] == (2, 3) and 0 <= as_tensor.min() and as_tensor.max() <= 1
    as_array = sample(pipeline, name, output_type="np")
    np.testing.assert_array_equal(as_array, as_tensor.permute(0, 2, 3, 1).numpy())
    as_images = sample(pipeline, name, output_type="pil")
    assert len(as_images) == 2 and all(isinstance(image, PIL.Image.Image) for image in as_images)
    np.testing.assert_array_equal(np.stack(as_images), (as_array * 255).round().astype(np.uint8))
    latents = sample(pipeline, name, output_type="latent")
    torch.testing.assert_close(pipeline.decode_latents(latents) / 2 + 0.5, as_tensor)
    with pytest.raises(ValueError, match="'jpeg'"):
        sample(pipeline, name, output_type="jpeg")


def test_return_dict(name):
    pipeline = build_pipeline(name)
    condition = PIPELINES[name].condition(2)
    output = pipeline(**condition, generator=generators(2), output_type="pt")
    as_tuple = pipeline(**condition, generator=generators(2), output_type="pt", return_dict=False)
    assert type(as_tuple) is tuple and len(as_tuple) == len(output)
    assert torch.equal(as_tuple[0], output.images)
    assert as_tuple[1] == output.nfe > 0


def test_a_list_of_generators_makes_images_independent_of_their_batch(name):
    pipeline = build_pipeline(name)
    together = sample(pipeline, name, 3)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    for index in range(3):
        condition = {key: values[index : index + 1] for key, values in PIPELINES[name].condition(3).items()}
        alone = pipeline(**condition, generator=[generators(3)[index]], output_type="pt").images
        torch.testing.assert_close(alone, together[index : index + 1], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        sample(pipeline, name, 3, generator=generators(2))


def test_one_generator_is_reproducible(name):
    pipeline = build_pipeline(name)
    rng = torch.get_rng_state()
    first, second = (sample(pipeline, name, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    other = sample(pipeline, name, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, second) and not torch.allclose(first, other, atol=1e-2)
    assert torch.equal(torch.get_rng_state(), rng), "the pipeline drew from the global generator"


def test_several_images_of_one_condition(name):
    pipeline = build_pipeline(name)
    repeated = {key: [value] * 2 for key, value in PIPELINES[name].single.items()}
    expected = pipeline(**repeated, generator=generators(2), output_type="pt").images
    actual = pipeline(
        **PIPELINES[name].single, num_images_per_prompt=2, generator=generators(2), output_type="pt"
    ).images
    assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match="num_images_per_prompt"):
        sample(pipeline, name, num_images_per_prompt=0)


def test_callback_runs_after_every_step(name):
    pipeline = build_pipeline(name)
    names = list(pipeline._callback_tensor_inputs)
    steps = []

    def callback(pipe, step, timestep, tensors):
        assert pipe is pipeline and list(tensors) == names
        assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
        steps.append(step)
        return {}

    images = sample(pipeline, name, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert steps == list(range(PIPELINES[name].steps))
    assert torch.equal(images, sample(pipeline, name))
    with pytest.raises(ValueError, match="no_such_tensor"):
        sample(pipeline, name, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["no_such_tensor"])


def test_callback_can_change_tensors(name):
    pipeline = build_pipeline(name)
    expected = sample(pipeline, name)
    for changed in PIPELINES[name].changeable:
        assert changed in pipeline._callback_tensor_inputs

        def negate(pipe, step, timestep, tensors, changed=changed):
            return {changed: -tensors[changed]} if step == 0 else {}

        images = sample(pipeline, name, callback_on_step_end=negate, callback_on_step_end_tensor_inputs=[changed])
        assert not torch.allclose(images, expected, atol=1e-3), changed


def test_callback_objects_of_diffusers(name):
    """Their ``tensor_inputs`` take the place of the argument."""

    class Recorder(PipelineCallback):
        tensor_inputs = list(PIPELINES[name].changeable)
        calls = 0

        def __init__(self):
            super().__init__(cutoff_step_ratio=1.0)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert list(callback_kwargs) == self.tensor_inputs
            self.calls += 1
            return callback_kwargs

    single, inside = Recorder(), Recorder()
    pipeline = build_pipeline(name)
    for callback in (single, MultiPipelineCallbacks([inside])):
        sample(pipeline, name, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
    assert single.calls == inside.calls == PIPELINES[name].steps


def test_progress_bar(name, capfd):
    pipeline = build_pipeline(name)
    sample(pipeline, name)
    assert capfd.readouterr() == ("", "")
    pipeline.set_progress_bar_config(disable=False)
    sample(pipeline, name)
    assert f"{PIPELINES[name].steps}/{PIPELINES[name].steps}" in capfd.readouterr().err


def test_model_cpu_offload(name):
    """Weights of a sleeping component are not a number here, so that whoever uses them spoils the images."""
    pipeline = build_pipeline(name)
    expected = sample(pipeline, name)
    pipeline.enable_model_cpu_offload(device="cpu")
    components = {key: getattr(pipeline, key) for key in PIPELINES[name].components}
    weights = {}
    for key, component in components.items():
        exempt = [prefix.partition(".")[2] for prefix in PIPELINES[name].read_directly if prefix.startswith(key + ".")]
        weights[key] = {
            parameter: parameter.detach().clone()
            for path, parameter in component.named_parameters()
            if not path.startswith(tuple(exempt))
        }

    def fall_asleep(key: str) -> None:
        for parameter in weights[key]:
            parameter.data.fill_(torch.nan)

    def wake(key: str) -> None:
        for other in components:
            if other != key:
                fall_asleep(other)
        for parameter, value in weights[key].items():
            parameter.data.copy_(value)

    for key, component in components.items():
        fall_asleep(key)
        hook = component._hf_hook
        woken = hook.pre_forward

        def pre_forward(module, *args, key=key, woken=woken, **kwargs):
            wake(key)
            return woken(module, *args, **kwargs)

        hook.pre_forward = pre_forward
    assert torch.equal(sample(pipeline, name), expected)


def test_a_call_leaves_no_trace_on_the_components(name):
    pipeline = build_pipeline(name)
    modules = [module for key in PIPELINES[name].components for module in getattr(pipeline, key).modules()]
    attributes = [set(vars(module)) for module in modules]
    weights = [tensor.clone() for module in modules for tensor in module.state_dict().values()]
    sample(pipeline, name)
    assert [set(vars(module)) for module in modules] == attributes
    after = [tensor for module in modules for tensor in module.state_dict().values()]
    assert all(torch.equal(one, other) for one, other in zip(after, weights, strict=True))
