"""What the training engine costs: its step against a bare PyTorch loop over the same model, data and optimizer.

    python benchmarks/training.py

Both train a VAR transformer on random codes, with the same batches, gradient clipping and weight average. Their
losses are compared first. Then they take turns, a few steps each. The table shows medians, and as overhead the median
ratio of neighbouring turns: of the time of a whole step, and of the CPU time of the process, which other programs on
the machine disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from helping import HelpFormatter, check_counts, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hfgen import VARTransformer
from hfgen.counters import numpy_generator
from hfgen.training import Phase, Task, Trainer, TrainingConfig, Validation
from hfgen.training.batches import BlockSampler, make_loader
from hfgen.training.ema import EMA
from hfgen.training.param_groups import parameter_groups

PATCH_NUMS = (1, 2, 3, 5, 8)
NUM_CODES, CODE_DIM, NUM_CLASSES = 256, 16, 24
TOKENS = sum(side**2 for side in PATCH_NUMS)


class RandomCodes(Dataset):
    """Codes, inputs and labels as a tokenizer would give them, kept in memory."""

    def __init__(self, length: int = 512) -> None:
        draw = numpy_generator(1)
        self.codes = torch.from_numpy(draw.integers(NUM_CODES, size=(length, TOKENS)))
        self.inputs = torch.from_numpy(draw.standard_normal((length, TOKENS - 1, CODE_DIM), dtype="float32"))
        self.labels = draw.integers(NUM_CLASSES, size=length).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor | int]:
        _, index = key
        return {"codes": self.codes[index], "inputs": self.inputs[index], "label": self.labels[index]}


def build_model(layers: int, heads: int) -> VARTransformer:
    torch.manual_seed(0)
    return VARTransformer(
        num_codes=NUM_CODES,
        code_dim=CODE_DIM,
        num_classes=NUM_CLASSES,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=32,
        patch_nums=PATCH_NUMS,
        class_dropout=0.0,
    ).train()


def compute_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(batch["inputs"], batch["label"]).logits.transpose(1, 2)
    return F.cross_entropy(logits, batch["codes"]), (logits.argmax(dim=1) == batch["codes"]).float().mean()


class CodesTask(Task):
    def __init__(self, model: VARTransformer) -> None:
        self.modules = {"transformer": model}
        self.phases = {"transformer": Phase(("transformer",))}
        self.averaged = ("transformer",)
        self.losses: list[Tensor] = []

    def training_step(self, batch, draws):
        loss, accuracy = compute_loss(self.modules["transformer"], batch)
        self.losses.append(loss.detach())
        yield "transformer", loss, {"accuracy": accuracy}

    def validate(self, modules, step) -> Validation:
        return Validation()

    def pipeline(self, modules):
        return modules["transformer"]


def engine_steps(config: TrainingConfig, model: VARTransformer, data: Dataset) -> Iterator[float]:
    """One optimizer step of the engine for each value taken: its loss."""
    trainer, task = Trainer(config), CodesTask(model)
    trainer._prepare(task, data)
    batches = iter(trainer.loader)
    while True:
        trainer._train_one_step(batches)
        trainer.step += 1
        yield float(task.losses[-1])


def bare_steps(config: TrainingConfig, model: VARTransformer, data: Dataset, device: torch.device) -> Iterator[float]:
    """The same as one would write it by hand."""
    model.to(device)
    average = EMA(model, config.ema_decay)
    groups = [
        {"params": group["params"], "weight_decay": config.weight_decay if group["decay"] else 0.0}
        for group in parameter_groups([model])
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=device.type == "cuda",
    )
    sampler = BlockSampler(len(data), config.batch_size, seed=config.seed)
    loader = make_loader(data, sampler, num_workers=config.num_workers, pin_memory=device.type == "cuda")
    for step, batch in enumerate(loader):
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        loss, _ = compute_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model, step)
        yield loss.item()


def timed(step: Callable[[], float], count: int) -> tuple[float, float]:
    """Wall and CPU seconds of one step, as the mean of ``count``."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--heads", type=int, default=4, help="attention heads of width 32")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[8, 32], help="images per step")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each")
    parser.add_argument("--steps", type=int, default=3, help="steps per turn")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--num_workers", type=int, default=0, help="data loading processes")
    parser.add_argument("--no_progress", action="store_true", help="no progress bar")
    arguments = parser.parse_args()
    check_counts(parser, arguments, ("layers", "heads", "batch_size", "rounds", "steps", "threads"))
    check_counts(parser, arguments, ("num_workers",), least=0)
    torch.set_num_threads(arguments.threads)

    print("| batch | bare ms | engine ms | overhead | bare CPU ms | engine CPU ms | CPU overhead |")
    print("|---|---|---|---|---|---|---|")
    for batch_size in arguments.batch_size:
        with tempfile.TemporaryDirectory() as folder:
            config = TrainingConfig(
                output_dir=str(Path(folder) / "run"),
                batch_size=batch_size,
                max_train_steps=10**6,
                num_workers=arguments.num_workers,
            )
            data = RandomCodes()
            engine = engine_steps(config, build_model(arguments.layers, arguments.heads), data)
            first = next(engine)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            bare = bare_steps(config, build_model(arguments.layers, arguments.heads), data, device)
            ours = [first, *(next(engine) for _ in range(4))]
            theirs = [next(bare) for _ in range(5)]
            if ours != theirs:
                raise AssertionError(f"The losses differ: engine {ours}, bare loop {theirs}.")
            times: dict[str, list[tuple[float, float]]] = {"bare": [], "engine": []}
            for turn in tqdm(range(arguments.rounds), disable=arguments.no_progress, desc=f"batch {batch_size}"):
                both = [("bare", bare), ("engine", engine)]
                for name, steps in both if turn % 2 else reversed(both):
                    times[name].append(timed(lambda steps=steps: next(steps), arguments.steps))
        medians = {name: [1e3 * statistics.median(column) for column in zip(*rows)] for name, rows in times.items()}
        cells = [f"{batch_size}"]
        for column in (0, 1):
            ratios = [after[column] / before[column] for before, after in zip(times["bare"], times["engine"])]
            cells += [f"{medians[name][column]:.1f}" for name in times]
            cells.append(f"{100 * (statistics.median(ratios) - 1):+.1f}%")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    run(main)
