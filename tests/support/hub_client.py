"""The two clients of the Hub round trip, each a process of its own: ``python -m support.hub_client push|pull FOLDER``.

``push`` uploads every tiny model and pipeline and leaves what it expects back in FOLDER. ``pull`` starts with an empty
cache, loads everything in all the ways that users have, and writes to FOLDER/report.json what came back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hfgen
from support.instances import MODELS, PIPELINES, build_model, build_pipeline


def push(folder: Path) -> None:
    for name in MODELS:
        model = build_model(name)
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        model.push_to_hub(f"tester/{name}")
        model.push_to_hub(f"tester/{name}")  # nothing changed: no commit
        model.push_to_hub(f"tester/{name}", subfolder="inside")
        # A branch with several small files of weights, and the way through save_pretrained to a private repository.
        model.push_to_hub(f"tester/{name}", revision="shards", max_shard_size="5KB")
        model.save_pretrained(str(folder / f"{name}-saved"), push_to_hub=True, repo_id=f"{name}-saved", private=True)
        model.half().push_to_hub(f"tester/{name}", variant="fp16", create_pr=True)
    for name in PIPELINES:
        pipeline = build_pipeline(name, **PIPELINES[name].arguments)
        save_file({"images": sample(pipeline, name).contiguous()}, folder / f"{name}.safetensors")
        pipeline.push_to_hub(f"tester/{name}")
        pipeline.push_to_hub(f"tester/{name}", revision="with-code", with_pipeline_file=True)


def pull(folder: Path) -> None:
    # First of all, so that nothing but `import hfgen` can have made diffusers know the library.
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    report = {"registration": {"known": "hfgen" in LOADABLE_CLASSES, "lazy": "hfgen.models" not in sys.modules}}

    from diffusers import AutoModel, DiffusionPipeline

    def same_images(pipeline, name: str) -> bool:
        pipeline.set_progress_bar_config(disable=True)
        return torch.equal(sample(pipeline, name), load_file(folder / f"{name}.safetensors")["images"])

    def same_weights(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> bool:
        expected = load_file(folder / f"{name}.safetensors")
        actual = model.state_dict()
        kept = set(model._keep_in_fp32_modules or ())
        dtypes = {key: torch.float32 if kept & set(key.split(".")) else dtype for key in expected}
        return (
            type(model) is getattr(hfgen, name)
            and actual.keys() == expected.keys()
            and all(torch.equal(actual[key], value.to(dtypes[key])) for key, value in expected.items())
        )

    for name, case in PIPELINES.items():
        repo = f"tester/{name}"
        report[name] = {
            "own class": same_images(getattr(hfgen, name).from_pretrained(repo), name),
            "AutoPipeline": same_images(hfgen.AutoPipeline.from_pretrained(repo), name),
            "offline": same_images(hfgen.AutoPipeline.from_pretrained(repo, local_files_only=True), name),
        }
        by_code = DiffusionPipeline.from_pretrained(
            repo, revision="with-code", custom_pipeline=repo, custom_revision="with-code", trust_remote_code=True
        )
        report[name]["pipeline.py"] = same_images(by_code, name)
        for subfolder, model in case.components.items():
            loaders = {"hfgen.AutoModel": hfgen.AutoModel, "diffusers.AutoModel": AutoModel}
            for loader, auto_class in loaders.items():
                loaded = auto_class.from_pretrained(repo, subfolder=subfolder)
                expected = build_model(model, **case.changes.get(subfolder, {})).state_dict()
                report[name][f"{loader} {subfolder}"] = all(
                    torch.equal(value, expected[key]) for key, value in loaded.state_dict().items()
                )
    for name in MODELS:
        repo = f"tester/{name}"
        half = {"variant": "fp16", "revision": "refs/pr/1", "dtype": torch.float16}
        report[name] = {
            "own class": same_weights(getattr(hfgen, name).from_pretrained(repo), name),
            "AutoModel": same_weights(hfgen.AutoModel.from_pretrained(repo), name),
            "offline": same_weights(hfgen.AutoModel.from_pretrained(repo, local_files_only=True), name),
            "subfolder": same_weights(hfgen.AutoModel.from_pretrained(repo, subfolder="inside"), name),
            "branch of shards": same_weights(hfgen.AutoModel.from_pretrained(repo, revision="shards"), name),
            "save_pretrained": same_weights(hfgen.AutoModel.from_pretrained(f"{repo}-saved"), name),
            "pull request": same_weights(hfgen.AutoModel.from_pretrained(repo, **half), name, torch.float16),
        }
    first = next(iter(MODELS))
    report["errors"] = {
        "missing": error_of(lambda: hfgen.AutoPipeline.from_pretrained("tester/missing")),
        "model as pipeline": error_of(lambda: hfgen.AutoPipeline.from_pretrained(f"tester/{first}")),
        "wrong token": error_of(
            lambda: hfgen.AutoModel.from_pretrained(f"tester/{first}", token="hf_wrong", force_download=True)
        ),
    }
    (folder / "report.json").write_text(json.dumps(report))


def sample(pipeline, name: str) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipeline(**PIPELINES[name].condition(2), generator=generators, output_type="pt").images


def error_of(load: Callable[[], object]) -> str:
    try:
        load()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"push": push, "pull": pull}[sys.argv[1]](Path(sys.argv[2]))
