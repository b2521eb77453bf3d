"""The steps of a flow as pictures."""

import numpy as np
import pytest
import torch

from hfgen.pipelines.steps import DenoisedRecorder
from support.instances import build_pipeline


def test_a_frame_is_the_image_that_a_step_points_to():
    pipeline, seen = build_pipeline("RectifiedFlowPipeline"), []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["denoised"])
        return {}

    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"num_inference_steps": 3, "latents": noise}
    keeping = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["denoised"]}
    pipeline(class_labels=[0, 1], **arguments, **keeping)
    recorder = DenoisedRecorder()
    pipeline(class_labels=[1, 2], **arguments, callback_on_step_end=recorder)  # another call, of which nothing stays
    images = pipeline(class_labels=[0, 1], **arguments, callback_on_step_end=recorder).images
    assert len(recorder.denoised) == 3 and all(torch.equal(*pair) for pair in zip(recorder.denoised, seen))
    for index, image in enumerate(images):
        frames = recorder.frames(pipeline, index)
        assert len(frames) == 3
        expected = (pipeline.decode_latents(seen[0][index]) + 1) * 127.5
        assert np.abs(np.asarray(frames[0]) - expected.permute(1, 2, 0).numpy()).max() <= 0.51
        # The last step goes all the way.
        assert np.abs(np.asarray(frames[-1]).astype(int) - np.asarray(image)).max() <= 1


def test_nothing_recorded():
    pipeline, recorder = build_pipeline("RectifiedFlowPipeline"), DenoisedRecorder()
    with pytest.raises(ValueError, match="No steps of image 0 were recorded"):
        recorder.frames(pipeline)
    pipeline(class_labels=[0], num_inference_steps=1, callback_on_step_end=recorder)
    with pytest.raises(ValueError, match="No steps of image 1 were recorded"):
        recorder.frames(pipeline, 1)
