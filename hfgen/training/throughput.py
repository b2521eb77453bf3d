"""How fast a run is: images per second, waiting for data, memory, and how much of the device the model uses."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Dense peaks in TFLOP/s as (name in torch.cuda.get_device_name, float32, TF32, float16 and bfloat16). Sources: the
# data sheets and architecture papers of NVIDIA and AMD; where they state numbers with sparsity, half of them.
PEAK_TFLOPS = (
    (r"B200\b", 75.0, 1125.0, 2250.0),
    (r"H200\b", 67.0, 494.7, 989.4),
    (r"H100.*PCIe", 51.0, 378.0, 756.0),
    (r"H100 NVL", 60.0, 417.5, 835.5),
    (r"H100.*HBM3", 67.0, 494.7, 989.4),
    (r"A100\b", 19.5, 156.0, 312.0),
    (r"A40$", 37.4, 74.8, 149.7),
    (r"A10$", 31.2, 62.5, 125.0),
    (r"L40S$", 91.6, 183.0, 362.0),
    (r"L4$", 30.3, 60.0, 121.0),
    (r"V100-SXM2", 15.7, 15.7, 125.0),
    (r"T4$", 8.1, 8.1, 65.0),
    (r"RTX A6000$", 38.7, 77.4, 154.8),
    (r"RTX 4090$", 82.6, 82.6, 165.2),
    (r"RTX 3090$", 35.6, 35.6, 71.0),
    (r"MI300X\b", 163.4, 653.7, 1307.4),
)


def known_peak_tflops(device: torch.device, mixed_precision: str) -> float | None:
    """The dense peak of a known GPU in TFLOP/s for matrix products in that precision; None for any other device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for pattern, float32, tf32, half in PEAK_TFLOPS:
        if re.search(pattern, name):
            if mixed_precision != "no":
                return half
            return float32 if torch.get_float32_matmul_precision() == "highest" else tf32
    return None


_aten = torch.ops.aten
# Attention on the CPU has operators of its own, which torch's table of formulas lacks; the arguments are the same.
_SAME_FORMULA = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}


class ModelFlops(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, convolutions and attention, forward and backward.

    The formulas are those of ``torch.utils.flop_counter``. Operations that gradient checkpointing repeats are not
    counted: they are no work of the model. Nothing else changes: the same kernels run, no random number is drawn.

    Attributes:
        total: operations so far; a multiplication and an addition are two.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        operator = getattr(func, "_overloadpacket", func)
        formula = flop_registry.get(_SAME_FORMULA.get(operator, operator))
        # The backward pass runs without gradients, except for the forward operations that checkpointing repeats in it.
        repeated = torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
        if formula is not None and not repeated:
            self.total += formula(*args, **kwargs, out_val=output)
        return output


class Throughput:
    """Speed since the last line of the log.

    The operations of a step are counted in the first step, and again after a step in which other phases had a loss
    (the start of an adversarial loss).

    Args:
        device: of this process.
        images_per_step: of this process, in one optimizer step.
        num_processes: of the run.
        peak_tflops: what the device can reach in TFLOP/s; None logs no utilisation.
    """

    def __init__(
        self, device: torch.device, *, images_per_step: int, num_processes: int, peak_tflops: float | None
    ) -> None:
        self.device = device
        self.images_per_step = images_per_step
        self.num_processes = num_processes
        self.peak_tflops = peak_tflops
        self.flops_per_image = 0.0
        self.phases: list[str] | None = None
        self.counting = True
        self.counted = 0
        self.restart()

    def restart(self) -> None:
        """Begin a new line of the log; also called after work that is no training (validation, checkpoints)."""
        self.started = time.perf_counter()
        self.steps = 0
        self.data_seconds = self.flops = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around getting a batch: from the request until it is on the device, with workers too."""
        started = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - started

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around the forward and backward passes of a micro-batch."""
        if not self.counting:
            yield
            return
        # Kernels of compiled code are invisible to the counter.
        with torch.compiler.set_stance("force_eager"), ModelFlops() as counter:
            yield
        self.counted += counter.total

    def end_step(self, phases: list[str]) -> None:
        """After the last micro-batch of a step in which these phases had a loss."""
        if self.counting:
            self.flops_per_image = self.counted / self.images_per_step
            self.phases, self.counting, self.counted = phases, False, 0
        elif phases != self.phases:
            self.counting = True
        self.steps += 1
        self.flops += self.flops_per_image * self.images_per_step

    def record(self) -> dict[str, float]:
        """The values of a line of the log.

        ``images_per_second`` over all processes; ``data_wait_fraction`` of the time; ``model_tflops`` per second and
        device; ``model_flops_utilisation``, its share of the peak; ``max_memory_gib``, the most that the process held:
        of the GPU, or of the main memory without one.
        """
        seconds = max(time.perf_counter() - self.started, 1e-9)
        tflops = self.flops / seconds / 1e12
        record = {
            "images_per_second": round(self.steps * self.images_per_step * self.num_processes / seconds, 2),
            "data_wait_fraction": round(self.data_seconds / seconds, 4),
            "model_tflops": round(tflops, 6),
        }
        if self.peak_tflops is not None:
            record["model_flops_utilisation"] = round(tflops / self.peak_tflops, 4)
        record["max_memory_gib"] = round(peak_memory_gib(self.device), 3)
        return record

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: a compiled run must not count again, because the counted step is not compiled."""
        return {"flops_per_image": self.flops_per_image, "phases": self.phases, "counting": self.counting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.flops_per_image, self.phases, self.counting = state["flops_per_image"], state["phases"], state["counting"]


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process held so far, in GiB: of the GPU, or resident without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
