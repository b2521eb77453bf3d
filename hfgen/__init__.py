"""hfgen: image tokenizers, generators, schedulers and pipelines behind one Hugging Face interface.

This module is the list of public names. A name is imported when it is first used, so that ``import hfgen`` costs
milliseconds and needs neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from hfgen.hub import BASE_CLASSES, register_library

__version__ = "0.1.0"

# Public name -> the module that defines it.
_EXPORTS = {
    "AutoModel": "hfgen.auto",
    "AutoPipeline": "hfgen.auto",
    "ClusteringVectorQuantizer": "hfgen.models.quantizers.clustering",
    "DiT": "hfgen.models.generators.dit",
    "EntropyVectorQuantizer": "hfgen.models.quantizers.entropy",
    "ImageBert": "hfgen.models.generators.image_bert",
    "ImageDiffusionPipeline": "hfgen.pipelines.diffusion",
    "InterpolantSDEScheduler": "hfgen.schedulers.interpolant_sde",
    "LinearQuantizer": "hfgen.models.quantizers.linear",
    "MaskGITPipeline": "hfgen.pipelines.maskgit",
    "MaskGITTransformer": "hfgen.models.generators.maskgit",
    "MaskGITVQGAN": "hfgen.models.tokenizers.maskgit_vqgan",
    "MaskedTokenScheduler": "hfgen.schedulers.masked_token",
    "MeanFlowPipeline": "hfgen.pipelines.mean_flow",
    "MultiScaleResidualQuantizer": "hfgen.models.quantizers.multiscale",
    "MultiScaleVQVAE": "hfgen.models.tokenizers.multiscale_vqvae",
    "NCSNpp": "hfgen.models.generators.ncsnpp",
    "NoisyLatentQuantizer": "hfgen.models.quantizers.noisy_latents",
    "RectifiedFlowPipeline": "hfgen.pipelines.rectified_flow",
    "RespacedDDPMScheduler": "hfgen.schedulers.respaced_ddpm",
    "TiTok": "hfgen.models.tokenizers.titok",
    "TransfusionFlowTransformer": "hfgen.models.generators.transfusion_flow",
    "TransfusionPipeline": "hfgen.pipelines.transfusion",
    "TransfusionTransformer": "hfgen.models.generators.transfusion",
    "UViTBert": "hfgen.models.generators.uvit",
    "VARPipeline": "hfgen.pipelines.var",
    "VARTransformer": "hfgen.models.generators.var",
    "VectorQuantizer": "hfgen.models.quantizers.vector",
    "captioned_shapes": "hfgen.data.shapes",
    "from_official": "hfgen.official",
    "load_original": "hfgen.conversion",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    # The base classes are no public names of hfgen: the diffusers loader looks them up in the library of a component.
    module = _EXPORTS.get(name) or BASE_CLASSES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


# In a checkout, hfgen.pipelines and hfgen.conversion are folders beside the package; setup.py maps them when hfgen is
# installed, and this finds them when it is not.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file():
    __path__.append(str(_CHECKOUT))

register_library()
