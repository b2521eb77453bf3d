"""The launch configurations in examples/accelerate are ones that accelerate and the trainer understand."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
TYPES = {"deepspeed_zero2": DistributedType.DEEPSPEED, "fsdp2": DistributedType.FSDP}


def _launch_flags() -> set[str]:
    parser = launch_command_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    return {action.dest for action in parser._actions}


def test_all_ways_are_there():
    assert [file.stem for file in FILES] == ["deepspeed_zero2", "fsdp2", "multi_gpu_ddp", "multi_node_ddp"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_knows_every_key(file):
    """Its loader rejects unknown keys of the file itself, but takes any key of a nested one."""
    config = load_config_from_file(str(file))
    assert config.distributed_type == TYPES.get(file.stem, DistributedType.MULTI_GPU)
    assert config.mixed_precision == "bf16" and config.num_processes > 1
    assert {*config.fsdp_config, *config.deepspeed_config} <= _launch_flags()
    assert f"--config_file examples/accelerate/{file.name}" in file.read_text()


def test_what_the_files_differ_in():
    files = {file.stem: yaml.safe_load(file.read_text()) for file in FILES}
    assert files["multi_node_ddp"]["num_machines"] == 2 and "main_process_ip" in files["multi_node_ddp"]
    assert files["fsdp2"]["fsdp_config"] == {"fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": False}
    assert files["deepspeed_zero2"]["deepspeed_config"] == {
        "zero_stage": 2,
        "offload_optimizer_device": "none",
        "offload_param_device": "none",
        "zero3_init_flag": False,
    }
