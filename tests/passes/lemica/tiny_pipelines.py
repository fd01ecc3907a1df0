"""Tiny pipelines of each family, built from configs with random weights, offline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def dit(*, classes: int = 10, layers: int = 3) -> Any:
    """A DiTPipeline of 8 × 8 latents with 4 channels: ``pipeline(class_labels=[…])``; no class is the last label."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=8,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    randomize(transformer)
    pipeline = DiTPipeline(
        transformer=transformer.eval(),
        vae=autoencoder(),
        scheduler=DDIMScheduler(num_train_timesteps=1000, clip_sample=False),
        id2label={index: f"class {index}" for index in range(classes)},
    )
    return quiet(pipeline)


def autoencoder(channels: int = 4) -> Any:
    """A decoder of 4 latent channels to images of twice the size."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
    ).eval()


def randomize(module: torch.nn.Module, scale: float = 0.1, seed: int = 0) -> None:
    """Fill every parameter with noise: gates that start at 0 would make blocks identities from the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)


def quiet(pipeline: Any) -> Any:
    """Show no progress."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class Tiny:
    """A pipeline with what it is called with, and what a test must know of its blocks.

    Attributes
    ----------
    pipeline : diffusers.DiffusionPipeline
        In float64.
    arguments : callable
        Of the batch size: arguments of the pipeline's call but steps and generator; the result is latents.
    branches : int
        Calls of the denoiser a step.
    blocks : tuple of str
        Lists of the main stack.
    returns : str
        What a block returns: "hidden", "hidden context" or "context hidden".
    """

    pipeline: Any
    arguments: Callable[[int], dict[str, Any]]
    branches: int = 1
    blocks: tuple[str, ...] = ("transformer_blocks",)
    returns: str = "hidden"

    def run(self, steps: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
        """Return the latents of a run."""
        generator = torch.Generator().manual_seed(seed)
        called = self.pipeline(
            num_inference_steps=steps, generator=generator, **self.arguments(batch), return_dict=False
        )
        result = called[0]
        return torch.stack(list(result)) if isinstance(result, list) else result

    def stack(self, denoiser: str = "transformer") -> list[torch.nn.Module]:
        """Return the blocks of the main stack."""
        return [block for name in self.blocks for block in getattr(getattr(self.pipeline, denoiser), name)]


WIDTH = 8
"""Channels of the text states of every tiny pipeline but LTX-Video's."""


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    """Text states and the like: random, float64, the same for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _tiny(kind: str, denoiser: torch.nn.Module, scheduler: Any, **others: Any) -> Any:
    import diffusers

    randomize(denoiser)
    name = "unet" if "UNet" in type(denoiser).__name__ else "transformer"
    pipeline = getattr(diffusers, kind)(**{name: denoiser.double().eval()}, scheduler=scheduler, **others)
    return quiet(pipeline)


def _nothing(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def _flow() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def dit_latents() -> Tiny:
    """DiT: guidance in one batch. The pipeline gives no latents, so the result is the decoded image."""
    return Tiny(
        _double(dit()),
        lambda batch: {"class_labels": list(range(batch)), "guidance_scale": 2.0, "output_type": "pt"},
    )


def _double(pipeline: Any) -> Any:
    pipeline.transformer.double()
    pipeline.vae.double()
    return pipeline


def _pixart(kind: str) -> Tiny:
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        caption_channels=WIDTH,
    )
    pipeline = _tiny(kind, transformer, DPMSolverMultistepScheduler(), **_nothing("tokenizer", "text_encoder", "vae"))

    def arguments(batch: int) -> dict[str, Any]:
        return {
            "prompt_embeds": noise(batch, 5, WIDTH),
            "prompt_attention_mask": torch.ones(batch, 5),
            "negative_prompt": None,
            "negative_prompt_embeds": noise(batch, 5, WIDTH, seed=6),
            "negative_prompt_attention_mask": torch.ones(batch, 5),
            "height": 64,
            "width": 64,
            "use_resolution_binning": False,
            "output_type": "latent",
        }

    return Tiny(pipeline, arguments)


def pixart_alpha() -> Tiny:
    """PixArt-α: guidance in one batch, a scheduler with memory."""
    return _pixart("PixArtAlphaPipeline")


def pixart_sigma() -> Tiny:
    """PixArt-Σ."""
    return _pixart("PixArtSigmaPipeline")


def sd3() -> Tiny:
    """SD3: guidance in one batch; the last block returns no text states."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
    )
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipeline = _tiny("StableDiffusion3Pipeline", transformer, _flow(), **_nothing(*names))

    def arguments(batch: int) -> dict[str, Any]:
        return {
            "prompt_embeds": noise(batch, 5, WIDTH),
            "pooled_prompt_embeds": noise(batch, WIDTH),
            "negative_prompt_embeds": noise(batch, 5, WIDTH, seed=6),
            "negative_pooled_prompt_embeds": noise(batch, WIDTH, seed=6),
            "output_type": "latent",
        }

    return Tiny(pipeline, arguments, returns="context hidden")


def flux() -> Tiny:
    """FLUX.1 with true guidance: two calls a step; two kinds of blocks."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = _tiny("FluxPipeline", transformer, _flow(), **_nothing(*names))

    def arguments(batch: int) -> dict[str, Any]:
        return {
            "prompt_embeds": noise(batch, 5, WIDTH),
            "pooled_prompt_embeds": noise(batch, WIDTH),
            "negative_prompt_embeds": noise(batch, 5, WIDTH, seed=6),
            "negative_pooled_prompt_embeds": noise(batch, WIDTH, seed=6),
            "true_cfg_scale": 2.0,
            "height": 64,
            "width": 64,
            "output_type": "latent",
        }

    return Tiny(pipeline, arguments, 2, ("transformer_blocks", "single_transformer_blocks"), "context hidden")


def qwen_image() -> Tiny:
    """Qwen-Image: two calls a step, of prompts of different length."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    pipeline = _tiny("QwenImagePipeline", transformer, _flow(), **_nothing("vae", "text_encoder", "tokenizer"))

    def arguments(batch: int) -> dict[str, Any]:
        return {
            "prompt_embeds": noise(batch, 5, WIDTH),
            "prompt_embeds_mask": torch.ones(batch, 5, dtype=torch.int64),
            "negative_prompt_embeds": noise(batch, 3, WIDTH, seed=6),
            "negative_prompt_embeds_mask": torch.ones(batch, 3, dtype=torch.int64),
            "true_cfg_scale": 2.0,
            "height": 64,
            "width": 64,
            "output_type": "latent",
        }

    return Tiny(pipeline, arguments, 2, returns="context hidden")


def wan(*, two: bool = False) -> Tiny:
    """Wan: two calls a step, a scheduler with memory; with ``two``, another transformer for the low noise (2.2)."""
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

    def transformer(seed: int) -> Any:
        torch.manual_seed(seed)
        built = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=16,
            ffn_dim=16,
            num_layers=3,
            rope_max_seq_len=32,
        )
        randomize(built, seed=seed)
        return built.double().eval()

    others = {"transformer_2": transformer(1), "boundary_ratio": 0.9} if two else {}
    pipeline = _tiny(
        "WanPipeline",
        transformer(0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        **_nothing("tokenizer", "text_encoder", "vae"),
        **others,
    )

    def arguments(batch: int) -> dict[str, Any]:
        return {
            "prompt_embeds": noise(batch, 5, WIDTH),
            "negative_prompt_embeds": noise(batch, 5, WIDTH, seed=6),
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "output_type": "latent",
        }

    return Tiny(pipeline, arguments, 2, ("blocks",))


def hunyuan_video() -> Tiny:
    """HunyuanVideo with true guidance: two calls a step; two kinds of blocks, and a refiner of the text."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(2, 2, 4),
    )
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = _tiny("HunyuanVideoPipeline", transformer, _flow(), **_nothing(*names))

    def arguments(batch: int) -> dict[str, Any]:
        return {
            "prompt_embeds": noise(batch, 5, WIDTH),
            "pooled_prompt_embeds": noise(batch, WIDTH),
            "prompt_attention_mask": torch.ones(batch, 5),
            "negative_prompt_embeds": noise(batch, 5, WIDTH, seed=6),
            "negative_pooled_prompt_embeds": noise(batch, WIDTH, seed=6),
            "negative_prompt_attention_mask": torch.ones(batch, 5),
            "true_cfg_scale": 2.0,
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "output_type": "latent",
        }

    return Tiny(pipeline, arguments, 2, ("transformer_blocks", "single_transformer_blocks"), "hidden context")


def cogvideox() -> Tiny:
    """CogVideoX: guidance in one batch."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=3,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=5,
    )
    pipeline = _tiny(
        "CogVideoXPipeline", transformer, CogVideoXDDIMScheduler(), **_nothing("tokenizer", "text_encoder", "vae")
    )

    def arguments(batch: int) -> dict[str, Any]:
        return {
            "prompt_embeds": noise(batch, 5, WIDTH),
            "negative_prompt_embeds": noise(batch, 5, WIDTH, seed=6),
            "num_frames": 5,
            "output_type": "latent",
        }

    return Tiny(pipeline, arguments, returns="hidden context")


def ltx_video() -> Tiny:
    """LTX-Video: guidance in one batch."""
    from diffusers import LTXVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=3,
        caption_channels=WIDTH,
    )
    pipeline = _tiny("LTXPipeline", transformer, _flow(), **_nothing("vae", "text_encoder", "tokenizer"))

    def arguments(batch: int) -> dict[str, Any]:
        return {
            "prompt_embeds": noise(batch, 5, WIDTH),
            "prompt_attention_mask": torch.ones(batch, 5),
            "negative_prompt_embeds": noise(batch, 5, WIDTH, seed=6),
            "negative_prompt_attention_mask": torch.ones(batch, 5),
            "height": 64,
            "width": 64,
            "num_frames": 9,
            "output_type": "latent",
        }

    return Tiny(pipeline, arguments)


def latte() -> Tiny:
    """Latte: guidance in one batch; blocks over space and time in turn, with work between them."""
    from diffusers import DDIMScheduler, LatteTransformer3DModel

    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=WIDTH,
        video_length=3,
    )
    pipeline = _tiny(
        "LattePipeline", transformer, DDIMScheduler(clip_sample=False), **_nothing("tokenizer", "text_encoder", "vae")
    )

    def arguments(batch: int) -> dict[str, Any]:
        return {
            "prompt_embeds": noise(batch, 5, WIDTH),
            "negative_prompt": None,
            "negative_prompt_embeds": noise(batch, 5, WIDTH, seed=6),
            "height": 64,
            "width": 64,
            "video_length": 3,
            "clean_caption": False,
            "output_type": "latent",
        }

    return Tiny(pipeline, arguments, blocks=("transformer_blocks", "temporal_transformer_blocks"))


def z_image() -> Tiny:
    """Z-Image: guidance in one batch, which is a list; refiners of noise and text before the main stack."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 16, 16],
    )
    pipeline = _tiny("ZImagePipeline", transformer, _flow(), **_nothing("vae", "text_encoder", "tokenizer"))

    def arguments(batch: int) -> dict[str, Any]:
        return {
            "prompt_embeds": [noise(5, WIDTH, seed=20 + index) for index in range(batch)],
            "negative_prompt_embeds": [noise(3, WIDTH, seed=30 + index) for index in range(batch)],
            "height": 64,
            "width": 64,
            "output_type": "latent",
        }

    return Tiny(pipeline, arguments, blocks=("layers",))


def _unet(**others: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        **others,
    )


def sd15() -> Tiny:
    """Stable Diffusion 1.5: a UNet, guidance in one batch."""
    from diffusers import DDIMScheduler

    names = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipeline = _tiny(
        "StableDiffusionPipeline",
        _unet(),
        DDIMScheduler(clip_sample=False, steps_offset=1),
        **_nothing(*names),
        requires_safety_checker=False,
    )

    def arguments(batch: int) -> dict[str, Any]:
        return {
            "prompt_embeds": noise(batch, 5, WIDTH),
            "negative_prompt_embeds": noise(batch, 5, WIDTH, seed=6),
            "output_type": "latent",
        }

    return Tiny(pipeline, arguments, blocks=())


def sdxl() -> Tiny:
    """SDXL: a UNet that also takes sizes and pooled text states."""
    from diffusers import EulerDiscreteScheduler

    unet = _unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + WIDTH
    )
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = _tiny(
        "StableDiffusionXLPipeline", unet, EulerDiscreteScheduler(), **_nothing(*names), add_watermarker=False
    )

    def arguments(batch: int) -> dict[str, Any]:
        return {
            "prompt_embeds": noise(batch, 5, WIDTH),
            "pooled_prompt_embeds": noise(batch, WIDTH),
            "negative_prompt_embeds": noise(batch, 5, WIDTH, seed=6),
            "negative_pooled_prompt_embeds": noise(batch, WIDTH, seed=6),
            "output_type": "latent",
        }

    return Tiny(pipeline, arguments, blocks=())


TRANSFORMERS: dict[str, Callable[[], Tiny]] = {
    "dit": dit_latents,
    "pixart-alpha": pixart_alpha,
    "pixart-sigma": pixart_sigma,
    "sd3": sd3,
    "flux": flux,
    "qwen-image": qwen_image,
    "wan": wan,
    "hunyuan-video": hunyuan_video,
    "cogvideox": cogvideox,
    "ltx-video": ltx_video,
    "latte": latte,
    "z-image": z_image,
}
UNETS: dict[str, Callable[[], Tiny]] = {"sd15": sd15, "sdxl": sdxl}
