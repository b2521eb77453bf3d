"""Each block of every public generator can be held in slices (FSDP2)."""

import torch

import hfgen
from support.torchrun import ROOT, torchrun


def test_every_generator_in_slices_equals_the_whole(tmp_path):
    torchrun(ROOT / "tests" / "support" / "sharded_generators.py", tmp_path)
    report = torch.load(tmp_path / "report.pt", weights_only=True)
    assert report.pop("processes") == 2
    public = [name for name in hfgen.__all__ if name != "__version__"]
    modules = {name: getattr(getattr(hfgen, name), "__module__", "") for name in public}
    assert set(report) == {name for name, module in modules.items() if module.startswith("hfgen.models.generators")}
    for name, result in report.items():
        torch.testing.assert_close(result["sharded"], result["whole"], rtol=1e-6, atol=1e-6, msg=name)
        assert result["sliced"] and result["trained"], name
