"""One row per published system: the single source of the table that the CLI prints and README.md shows.

A row states facts of the publication and names the parts that hfgen has for it. Whether a system works is derived
from the parts that are named, never written by hand. ``python -m hfgen.systems --markdown`` rewrites the table
between the markers of README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

TABLE_BEGIN = "<!-- systems: begin (written by `make readme`) -->"
TABLE_END = "<!-- systems: end -->"


@dataclass(frozen=True)
class System:
    """A published system and what hfgen has of it.

    Attributes:
        key: short name, also the name that converters and examples use.
        title: name of the system.
        paper: title of the paper.
        published: venue and year.
        arxiv: arXiv identifier.
        code: owner/name of the repository whose checkpoints and behaviour hfgen follows, None if there is none.
        weights_licence: licence of the released weights; None when no weights were released.
        tokenizer, generator, pipeline: class names that ``hfgen`` exports, None while missing or not applicable.
        variants: further classes of the same system.
        diffusers: classes of diffusers that are the system's tokenizer or generator.
        converter: system name for ``hfgen.conversion.load_original``.
        also_converts: converter of checkpoints that an open implementation made, where the authors released none.
        parity: names of the golden cases, numbers of the system's official code, that the tests in ``tests/parity``
            reproduce.
        examples: training scripts, relative to the repository root.
        zoo: folder below ``zoo/`` with a small trained pipeline.
        pipeline_arguments: constructor arguments of the pipeline with which the published weights sample as published.
        autoencoder: Hub id of the ``AutoencoderKL``, or of a pipeline that holds it, on whose latents the published
            weights work, if that is not one of the system's own classes.
        notes: what a user should know before choosing the system.
    """

    key: str
    title: str
    paper: str
    published: str
    arxiv: str
    code: str | None
    weights_licence: str | None
    tokenizer: str | None = None
    generator: str | None = None
    pipeline: str | None = None
    variants: tuple[str, ...] = ()
    diffusers: tuple[str, ...] = ()
    converter: str | None = None
    also_converts: str | None = None
    parity: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    zoo: str | None = None
    pipeline_arguments: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    autoencoder: str | None = None
    notes: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names of the row, in the order tokenizer, generator, pipeline, variants."""
        named = (self.tokenizer, self.generator, self.pipeline, *self.variants)
        return tuple(name for name in named if name is not None)

    @property
    def all_classes(self) -> tuple[str, ...]:
        """The same and those of diffusers, with the name of that library."""
        return (*self.classes, *(f"diffusers.{name}" for name in self.diffusers))

    @property
    def any_converter(self) -> str | None:
        """The converter of official checkpoints, or of those of an open implementation."""
        return self.converter or self.also_converts

    @property
    def status(self) -> str:
        """``works``, ``trains`` or ``not yet``.

        ``works``: everything that was released can be used, with equal numbers: the classes exist, a generator has its
        pipeline, golden cases are reproduced, and official weights, where there are any, convert. Where there are none
        a training example takes their place.
        ``trains``: the classes and a training example exist, but official weights do not load, or nothing shows that
        the numbers are those of official code.
        """
        # A pipeline without a generator runs a network of diffusers.
        has_model = bool(self.tokenizer or self.generator or self.pipeline or self.diffusers)
        usable = has_model and (self.generator is None or self.pipeline is not None)
        if usable and self.parity and (self.converter or (self.weights_licence is None and self.examples)):
            return "works"
        return "trains" if usable and self.examples else "not yet"


# fmt: off
SYSTEMS: tuple[System, ...] = (
    System(
        key="var", title="VAR", published="NeurIPS 2024", arxiv="2404.02905",
        paper="Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction",
        code="FoundationVision/VAR", weights_licence="MIT",
        tokenizer="MultiScaleVQVAE", generator="VARTransformer", pipeline="VARPipeline", converter="var",
        parity=("var", "var_vqvae"),
        examples=("examples/train_multiscale_vqvae.py", "examples/train_var.py"),
        zoo="var-shapes",
        notes="Next-scale prediction: one forward pass per scale, coarse to fine.",
    ),
    System(
        key="vqvae", title="VQ-VAE", published="NeurIPS 2017", arxiv="1711.00937",
        paper="Neural Discrete Representation Learning",
        code="google-deepmind/sonnet", weights_licence=None,
        notes="The first learned image codes; with an EMA codebook and restarts as options.",
    ),
    System(
        key="vqgan", title="VQGAN", published="CVPR 2021", arxiv="2012.09841",
        paper="Taming Transformers for High-Resolution Image Synthesis",
        code="CompVis/taming-transformers", weights_licence="none stated (code MIT)",
        notes="Perceptual and adversarial tokenizer with a GPT over its codes.",
    ),
    System(
        key="vit_vqgan", title="ViT-VQGAN", published="ICLR 2022", arxiv="2110.04627",
        paper="Vector-quantized Image Modeling with Improved VQGAN",
        code="thuanz123/enhancing-transformers", weights_licence="MIT",
        notes="The authors released nothing: code and weights are those of an open reproduction.",
    ),
    System(
        key="vqgan_lc", title="VQGAN-LC", published="NeurIPS 2024", arxiv="2406.11837",
        paper="Scaling the Codebook Size of VQ-GAN to 100,000 with a Utilization Rate of 99%",
        code="zh460045050/VQGAN-LC", weights_licence="none stated",
        notes="Frozen codebook of CLIP feature centres behind a learned projector.",
    ),
    System(
        key="fsq", title="FSQ", published="ICLR 2024", arxiv="2309.15505",
        paper="Finite Scalar Quantization: VQ-VAE Made Simple",
        code="google-research/google-research", weights_licence=None,
        notes="A quantizer without parameters: every channel is rounded to a few levels.",
    ),
    System(
        key="lfq", title="Open-MAGVIT2 (LFQ)", published="2024", arxiv="2409.04410",
        paper="Open-MAGVIT2: An Open-Source Project Toward Democratizing Auto-regressive Visual Generation",
        code="TencentARC/SEED-Voken", weights_licence="Apache-2.0",
        notes="Lookup-free binary codes of MAGVIT-v2 (arXiv 2310.05737), whose own weights were not released.",
    ),
    System(
        key="ibq", title="IBQ", published="ICCV 2025", arxiv="2412.02692",
        paper="Scalable Image Tokenization with Index Backpropagation Quantization",
        code="TencentARC/SEED-Voken", weights_licence="Apache-2.0",
        notes="Gradients reach every code through the softmax over indices.",
    ),
    System(
        key="rqtransformer", title="RQ-VAE and RQ-Transformer", published="CVPR 2022", arxiv="2203.01941",
        paper="Autoregressive Image Generation using Residual Quantization",
        code="kakaobrain/rq-vae-transformer", weights_licence="CC-BY-NC-SA-4.0",
        notes="Weights are for non-commercial use.",
    ),
    System(
        key="titok", title="TiTok", published="NeurIPS 2024", arxiv="2406.07550",
        paper="An Image is Worth 32 Tokens for Reconstruction and Generation",
        code="bytedance/1d-tokenizer", weights_licence="Apache-2.0",
        tokenizer="TiTok", generator="ImageBert", pipeline="MaskGITPipeline", variants=("UViTBert",),
        converter="titok",
        parity=("titok",),
        examples=("examples/train_titok.py", "examples/train_maskgit.py"),
        zoo="titok-shapes",
        notes="A short sequence of tokens without a grid.",
    ),
    System(
        key="softvq", title="SoftVQ-VAE", published="CVPR 2025", arxiv="2412.10958",
        paper="SoftVQ-VAE: Efficient 1-Dimensional Continuous Tokenizer",
        code="Hhhhhhao/continuous_tokenizer", weights_licence="Apache-2.0",
        notes="Latents are softmax-weighted means of codes, so gradients are exact.",
    ),
    System(
        key="pixelcnn", title="PixelCNN++", published="ICLR 2017", arxiv="1701.05517",
        paper="PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other "
              "Modifications",
        code="openai/pixel-cnn", weights_licence="none stated (code Apache-2.0)",
        notes="Pixel by pixel with an exact likelihood.",
    ),
    System(
        key="gan", title="GAN", published="NeurIPS 2014", arxiv="1406.2661",
        paper="Generative Adversarial Networks",
        code=None, weights_licence=None,
        notes="The original game with the non-saturating generator loss on a DCGAN network.",
    ),
    System(
        key="vae", title="VAE and KL-VAE", published="ICLR 2014", arxiv="1312.6114",
        paper="Auto-Encoding Variational Bayes",
        code=None, weights_licence=None,
        diffusers=("AutoencoderKL",),
        examples=("examples/train_autoencoder_kl.py",), zoo="transfusion-shapes",
        notes="The tokenizer of latents that flows, diffusion and Transfusion train on; the generator that decodes "
        "plain noise is not there yet.",
    ),
    System(
        key="dalle", title="DALL-E", published="ICML 2021", arxiv="2102.12092",
        paper="Zero-Shot Text-to-Image Generation",
        code="openai/DALL-E", weights_licence="MIT with a request to indicate use",
        notes="Only the discrete VAE was released.",
    ),
    System(
        key="mindalle", title="minDALL-E", published="2021", arxiv="2102.12092",
        paper="Zero-Shot Text-to-Image Generation",
        code="kakaobrain/minDALL-E", weights_licence="CC-BY-NC-SA-4.0",
        notes="An open text-to-image transformer over VQGAN codes; weights are for non-commercial use.",
    ),
    System(
        key="parti", title="Parti", published="TMLR 2022", arxiv="2206.10789",
        paper="Scaling Autoregressive Models for Content-Rich Text-to-Image Generation",
        code="lucidrains/parti-pytorch", weights_licence=None,
        notes="Nothing was released by the authors; the code is an open implementation.",
    ),
    System(
        key="make_a_scene", title="Make-A-Scene", published="ECCV 2022", arxiv="2203.13131",
        paper="Make-A-Scene: Scene-Based Text-to-Image Generation with Human Priors",
        code="CasualGANPapers/Make-A-Scene", weights_licence=None,
        notes="Text and a segmentation map as conditions; nothing was released by the authors.",
    ),
    System(
        key="llamagen", title="LlamaGen", published="2024", arxiv="2406.06525",
        paper="Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
        code="FoundationVision/LlamaGen", weights_licence="MIT",
        notes="Plain next-token prediction with a Llama decoder; class or text condition.",
    ),
    System(
        key="flowar", title="FlowAR", published="ICML 2025", arxiv="2412.15205",
        paper="FlowAR: Scale-wise Autoregressive Image Generation Meets Flow Matching",
        code="OliverRensu/FlowAR", weights_licence="Apache-2.0",
        notes="Scales of one continuous latent, each drawn by flow matching.",
    ),
    System(
        key="rar", title="RAR", published="ICCV 2025", arxiv="2411.00776",
        paper="Randomized Autoregressive Visual Generation",
        code="bytedance/1d-tokenizer", weights_licence="Apache-2.0",
        notes="Trained on permuted token orders that anneal to raster order.",
    ),
    System(
        key="mar", title="MAR", published="NeurIPS 2024", arxiv="2406.11838",
        paper="Autoregressive Image Generation without Vector Quantization",
        code="LTH14/mar", weights_licence="none stated (code MIT)",
        notes="Masked autoregression over continuous tokens with a diffusion loss per token.",
    ),
    System(
        key="maskgit", title="MaskGIT", published="CVPR 2022", arxiv="2202.04200",
        paper="MaskGIT: Masked Generative Image Transformer",
        code="google-research/maskgit", weights_licence="none stated (code Apache-2.0)",
        tokenizer="MaskGITVQGAN", generator="MaskGITTransformer", pipeline="MaskGITPipeline", converter="maskgit",
        parity=("maskgit", "maskgit_vqgan"),
        examples=("examples/train_maskgit_vqgan.py", "examples/train_maskgit.py"),
        notes="Parallel decoding of masked tokens; its tokenizer also serves TiTok and RAR.",
    ),
    System(
        key="muse", title="Muse", published="ICML 2023", arxiv="2301.00704",
        paper="Muse: Text-To-Image Generation via Masked Generative Transformers",
        code="huggingface/open-muse", weights_licence=None,
        notes="Nothing was released by the authors; the code is an open implementation.",
    ),
    System(
        key="amused", title="aMUSEd", published="2024", arxiv="2401.01808",
        paper="aMUSEd: An Open MUSE Reproduction",
        code="huggingface/open-muse", weights_licence="OpenRAIL++",
        notes="Released in the layout of diffusers.",
    ),
    System(
        key="mae", title="MAE", published="CVPR 2022", arxiv="2111.06377",
        paper="Masked Autoencoders Are Scalable Vision Learners",
        code="facebookresearch/mae", weights_licence="CC-BY-NC-4.0",
        notes="Pre-training, not a generator; weights are for non-commercial use.",
    ),
    System(
        key="guided_diffusion", title="Guided diffusion (ADM)", published="NeurIPS 2021", arxiv="2105.05233",
        paper="Diffusion Models Beat GANs on Image Synthesis",
        code="openai/guided-diffusion", weights_licence="research use (model card)",
        diffusers=("UNet2DModel",), pipeline="ImageDiffusionPipeline",
        examples=("examples/train_diffusion.py",),
        notes="Schedules, losses and samplers are those of the official code; the U-Net is that of diffusers, without "
        "guidance by a classifier and without the official weights.",
    ),
    System(
        key="ldm", title="Latent diffusion", published="CVPR 2022", arxiv="2112.10752",
        paper="High-Resolution Image Synthesis with Latent Diffusion Models",
        code="CompVis/latent-diffusion", weights_licence="none stated (code MIT)",
        notes="U-Net on autoencoder latents. Its KL autoencoder trains, see VAE and KL-VAE.",
    ),
    System(
        key="dit", title="DiT", published="ICCV 2023", arxiv="2212.09748",
        paper="Scalable Diffusion Models with Transformers",
        code="facebookresearch/DiT", weights_licence="CC-BY-NC-4.0",
        generator="DiT", pipeline="ImageDiffusionPipeline", converter="dit",
        pipeline_arguments=MappingProxyType({"guidance_channels": 3}), autoencoder="stabilityai/sd-vae-ft-ema",
        parity=("dit",),
        examples=("examples/train_diffusion.py",),
        notes="Weights are for non-commercial use.",
    ),
    System(
        key="sit", title="SiT", published="ECCV 2024", arxiv="2401.08740",
        paper="SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers",
        code="willisma/SiT", weights_licence="MIT",
        generator="DiT", pipeline="RectifiedFlowPipeline", converter="sit",
        pipeline_arguments=MappingProxyType({"guidance_channels": 3}), autoencoder="stabilityai/sd-vae-ft-ema",
        parity=("dit",),
        examples=("examples/train_rectified_flow.py",),
        notes="The network of DiT with interpolant paths.",
    ),
    System(
        key="rectified_flow", title="Rectified flow", published="ICLR 2023", arxiv="2209.03003",
        paper="Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
        code="gnobitab/RectifiedFlow", weights_licence="none stated",
        generator="NCSNpp", pipeline="RectifiedFlowPipeline", converter="rectified_flow",
        parity=("rectified_flow",),
        examples=("examples/train_rectified_flow.py", "examples/reflow.py"),
        notes="With reflow, which straightens the paths for few-step sampling. The official weights are those of "
        "NCSN++; the scripts train DiT and MMDiT.",
    ),
    System(
        key="sd3", title="Stable Diffusion 3 (MMDiT)", published="ICML 2024", arxiv="2403.03206",
        paper="Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
        code="Stability-AI/sd3.5", weights_licence="Stability AI Community License",
        pipeline="RectifiedFlowPipeline", diffusers=("SD3Transformer2DModel",), converter="sd3",
        autoencoder="stabilityai/stable-diffusion-3-medium-diffusers",
        parity=("rectified_flow",),
        examples=("examples/train_rectified_flow.py",), zoo="flow-shapes",
        notes="The network is diffusers.SD3Transformer2DModel.",
    ),
    System(
        key="mean_flow", title="MeanFlow", published="NeurIPS 2025", arxiv="2505.13447",
        paper="Mean Flows for One-step Generative Modeling",
        code="Gsunshine/meanflow", weights_licence="MIT",
        generator="DiT", pipeline="MeanFlowPipeline", converter="mean_flow",
        autoencoder="stabilityai/sd-vae-ft-mse",
        parity=("mean_flow",),
        examples=("examples/train_mean_flow.py",), zoo="meanflow-shapes",
        notes="One forward pass per image.",
    ),
    System(
        key="showo", title="Show-o", published="ICLR 2025", arxiv="2408.12528",
        paper="Show-o: One Single Transformer to Unify Multimodal Understanding and Generation",
        code="showlab/Show-o", weights_licence="MIT (256 px), Apache-2.0 (512 px)",
        notes="One language model: text token by token, image tokens by masked prediction.",
    ),
    System(
        key="transfusion", title="Transfusion", published="ICLR 2025", arxiv="2408.11039",
        paper="Transfusion: Predict the Next Token and Diffuse Images with One Multi-Modal Model",
        code="lucidrains/transfusion-pytorch", weights_licence=None,
        generator="TransfusionTransformer", pipeline="TransfusionPipeline",
        variants=("NoisyLatentQuantizer", "TransfusionFlowTransformer"),
        parity=("transfusion", "transfusion_reference"),
        examples=("examples/train_transfusion.py", "examples/finetune_noise_robust_decoder.py"),
        zoo="transfusion-shapes",
        also_converts="transfusion_pytorch",
        notes="Nothing was released by the authors. The converter transfusion_pytorch reads checkpoints that the open "
        "implementation made, as TransfusionFlowTransformer, which hfgen.sampling.transfusion_flow samples from; it "
        "has no pipeline and no training script.",
    ),
)
# fmt: on


def as_dict(system: System) -> dict[str, object]:
    """A row as JSON values, with the derived ``status``."""
    # Not dataclasses.asdict, which cannot copy an immutable mapping.
    row = {each.name: getattr(system, each.name) for each in dataclasses.fields(system)}
    return row | {"pipeline_arguments": dict(system.pipeline_arguments), "status": system.status}


def markdown_table() -> str:
    """The table of README.md; what a system does not have yet is a dash."""
    lines = [
        "| system | paper | tokenizer, generator, pipeline | official weights | `hfgen convert` | golden cases "
        "| training | status |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for system in SYSTEMS:
        title = f"[{system.title}](https://github.com/{system.code})" if system.code else system.title
        paper = f"[{system.published}](https://arxiv.org/abs/{system.arxiv})"
        classes = ", ".join(f"`{name}`" for name in system.all_classes) or "-"
        parity = ", ".join(f"[{name}](tests/parity/cases/{name}.safetensors)" for name in system.parity) or "-"
        converter = f"`{system.any_converter}`" if system.any_converter else "-"
        links = [f"[{Path(path).stem}]({path})" for path in system.examples]
        links += [f"trained: [{system.zoo}](zoo/{system.zoo})"] if system.zoo else []
        examples = ", ".join(links) or "-"
        weights = system.weights_licence or "not released"
        cells = (title, paper, classes, weights, converter, parity, examples, system.status)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """``text`` with the current table between the two markers."""
    head, begin, rest = text.partition(TABLE_BEGIN)
    _, end, tail = rest.partition(TABLE_END)
    if not begin or not end:
        raise ValueError(f"Expected the markers {TABLE_BEGIN!r} and {TABLE_END!r}, in this order.")
    return f"{head}{begin}\n{markdown_table()}\n{end}{tail}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hfgen.systems", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--markdown", metavar="README", default="README.md", nargs="?", const="README.md",
        help="file whose table is rewritten (default: README.md in the current folder)",
    )  # fmt: skip
    path = Path(parser.parse_args(arguments).markdown)
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
