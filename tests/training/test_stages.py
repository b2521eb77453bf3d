"""Training in stages: a second run starts from the result of the first and leaves a part of it as it is."""

from __future__ import annotations

import torch

from hfgen.training import Trainer, TrainingConfig
from support.process_runs import CodebookModel, CodebookTask, Data, fit


class DecoderTask(CodebookTask):
    """The decoder of a trained model, against a critic; encoder and codebook stay."""

    def __init__(self, first_stage) -> None:
        super().__init__(random=True)
        model = CodebookModel.from_pretrained(first_stage)
        self.modules["model"] = model
        self.frozen = (model.encoder, model.quantizer)

    def training_step(self, batch, draws):
        model = self.modules["model"]
        assert model.decoder.training and not model.encoder.training and not model.quantizer.training
        yield from super().training_step(batch, draws)


def test_a_second_stage_trains_the_rest(tmp_path):
    fit(tmp_path / "first", processes=1, random=True, max_train_steps=3)
    before = CodebookModel.from_pretrained(tmp_path / "first" / "final").state_dict()
    assert before["quantizer.cluster_size"].ne(1).any()

    config = TrainingConfig(
        output_dir=str(tmp_path / "second"), max_train_steps=4, batch_size=8, learning_rate=1e-2, validation_steps=2,
        progress=False,
    )  # fmt: skip
    trainer = Trainer(config)
    assert trainer.fit(DecoderTask(tmp_path / "first" / "final"), Data())

    after = trainer.models["model"].state_dict()
    average = CodebookModel.from_pretrained(tmp_path / "second" / "final").state_dict()
    assert before.keys() == after.keys() == average.keys()
    for name, value in before.items():
        stays = not name.startswith("decoder")
        assert torch.equal(after[name], value) == stays and torch.equal(average[name], value) == stays, name
    trained = {id(value) for group in trainer.optimizers["model"].param_groups for value in group["params"]}
    assert trained == {id(value) for value in trainer.models["model"].decoder.parameters()}
