"""Transfusion sampling without a cache: the reference that the pipeline is measured against.

Every step runs the whole sequence, text and image, through the training pass, for both halves of the guided batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfgen import TransfusionPipeline
from hfgen.pipelines.transfusion_schedule import set_timesteps
from hfgen.sampling.guidance import guide


@torch.no_grad()
def sample_plain(pipe: TransfusionPipeline, prompts: list[str], noise: Tensor, num_steps: int, scale: float) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] of prompts of one length; the scheduler draws nothing."""
    config, scheduler, latents = pipe.transformer.config, pipe.scheduler, noise
    slots = [config.image_token_id] * pipe.image_form.num_tokens()
    rows = [[*row, *slots, config.eoi_token_id] for row in pipe.vocabulary.prompt_rows(prompts)]
    null = [[config.bos_token_id, config.boi_token_id, *slots, config.eoi_token_id]] * len(rows)
    halves = [torch.tensor(half, device=pipe.device) for half in (rows, null)]
    set_timesteps(scheduler, num_steps, pipe.device)
    for timestep in scheduler.timesteps:
        times = timestep.expand(len(latents))
        conditional, unconditional = (pipe.transformer(ids, latents, times).sample.float() for ids in halves)
        guided = guide(conditional, unconditional, scale)
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
    return pipe.decode_latents(latents)
