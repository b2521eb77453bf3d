"""What happens to updates that are not finite: they are left out, recorded, and after a while the run ends."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from accelerate.utils import gather_object
from torch import Tensor

from hfgen.training.batches import BlockSampler
from hfgen.training.history import write_text
from hfgen.training.streams import StreamSampler

logger = logging.getLogger(__name__)

BAD_BATCH_FILE = "bad_batch.json"
ITEMS_IN_MESSAGE = 16


class NonFiniteGuard:
    """Counts the updates of each phase that were left out in a row and names the batch that caused them.

    Args:
        output_dir: where ``bad_batch.json`` is written.
        sampler: of this process; it tells which items a step read.
        limit: end the run after this many in a row.
        is_main_process: whether this process writes and logs.
    """

    def __init__(
        self, output_dir: Path, sampler: BlockSampler | StreamSampler, *, limit: int, is_main_process: bool
    ) -> None:
        self.path = output_dir / BAD_BATCH_FILE
        self.sampler = sampler
        self.limit = limit
        self.is_main_process = is_main_process
        self.in_a_row: dict[str, int] = {}

    def passed(self, phase: str) -> None:
        """An update of ``phase`` was finite."""
        self.in_a_row[phase] = 0

    def skipped(
        self,
        phase: str,
        step: int,
        what: str,
        *,
        grad_norm: float,
        blocks: Sequence[Mapping[str, Tensor | float]],
        fields: Iterable[str],
    ) -> None:
        """Record an update that was left out. All processes call it together.

        Args:
            phase: whose update.
            step: the optimizer step, 0 is the first.
            what: "loss" or "gradient norm".
            grad_norm: as measured.
            blocks: the loss and the logged values of every micro-batch of this process.
            fields: the keys of the batch.

        Raises:
            FloatingPointError: when it was the ``limit``-th in a row.
        """
        self.in_a_row[phase] = self.in_a_row.get(phase, 0) + 1
        # What the numbers of the items count in; see the two samplers.
        unit = "lane" if isinstance(self.sampler, StreamSampler) else "epoch"
        sampler = copy.copy(self.sampler)
        sampler.start_step = step
        own = [
            {
                unit: keys[0][0],
                "indices": [index for _, index in keys],
                "values": {name: _json_number(float(value)) for name, value in values.items()},
            }
            for keys, values in zip(islice(sampler, len(blocks)), blocks, strict=True)
        ]
        everything = gather_object(own)
        # A loss tells its micro-batch; a gradient does not.
        guilty = [block for block in everything if isinstance(block["values"]["loss"], str)] or everything
        items = [index for block in guilty for index in block["indices"]]
        shown = ", ".join(map(str, items[:ITEMS_IN_MESSAGE])) + (", ..." if len(items) > ITEMS_IN_MESSAGE else "")
        fields = sorted(fields)
        batch = f"Items {shown} of {unit} {guilty[0][unit]} with {', '.join(fields)}; see {self.path}."
        if self.is_main_process:
            record = {
                "step": step + 1,
                "phase": phase,
                "not_finite": what,
                "grad_norm": _json_number(grad_norm),
                "fields": fields,
                "indices": items,
                "micro_batches": everything,
            }
            write_text(self.path, json.dumps(record, indent=2) + "\n")
            logger.warning("Step %d: the %s of phase %r is not finite; no update. %s", step + 1, what, phase, batch)
        if self.in_a_row[phase] >= self.limit:
            raise FloatingPointError(
                f"Step {step + 1}: the {what} of phase {phase!r} was not finite {self.in_a_row[phase]} times in a "
                f"row. {batch} Resume an earlier checkpoint with a lower --learning_rate or --mixed_precision bf16."
            )


def _json_number(value: float) -> float | str:
    """JSON has no nan and no infinity: they become text."""
    return value if math.isfinite(value) else str(value)
