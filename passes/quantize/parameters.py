"""Parameters of the quantize pass, checked against each other before anything is loaded."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from passes.base import PassParameters
from passes.quantize.schemes import SCHEMES, Method, Scheme, SchemeName

MethodName = Literal["auto", "gptq", "awq", "rtn", "smoothquant+gptq"]
MIN_BITS, MAX_BITS = 2.0, 8.5


class QuantizeParameters(PassParameters):
    """What ``--pass quantize:…`` takes; see ``docs/passes/quantize.md`` for the scheme table."""

    scheme: SchemeName = Field(
        default="w4a16", description="Numbers that weights (and activations) become; auto: bits by layer, to a budget."
    )
    method: MethodName = Field(
        default="auto", description="How weights are rounded; auto: the first that the scheme table lists."
    )
    bits: float | None = Field(
        default=None,
        ge=MIN_BITS,
        le=MAX_BITS,
        description="With scheme=auto: stored bits a quantized weight on average, scales included.",
    )
    group_size: int | None = Field(
        default=None, ge=8, description="Columns that share a scale; none: the largest of 128, 64, 32 that divides all."
    )
    symmetric: bool = Field(default=True, description="Integers around zero; false adds a zero point to each scale.")
    samples: int = Field(default=32, ge=1, description="Calibration windows.")
    length: int = Field(default=512, ge=8, description="Tokens of one calibration window.")
    ignore: tuple[str, ...] = Field(
        default=(), description="Layers to leave as they are: names, re:PATTERN, or class names."
    )
    experts: Literal["quantize", "skip"] = Field(
        default="quantize", description="Mixture-of-experts weights; one that cannot be quantized is an error."
    )
    kv_cache: Literal["none", "fp8"] = Field(default="none", description="fp8: scales for an FP8 KV cache (vLLM).")
    actorder: Literal["static", "none"] = Field(
        default="static", description="GPTQ's order of columns: by activation, or as they are."
    )
    dampening: float = Field(
        default=0.01, gt=0, le=1, description="GPTQ's dampening, as a part of the Hessian's mean diagonal."
    )

    @field_validator("method", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        """Take ``method=smoothquant+gptq``, which ``--pass`` reads as a list."""
        return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else value

    @field_validator("ignore", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("bits")
    @classmethod
    def _only_with_auto(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("scheme", "auto") != "auto":
            raise ValueError(f"is a budget for scheme=auto, and scheme is {info.data['scheme']}; leave it out")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        kind = self.kind
        if self.scheme == "auto" and self.bits is None:
            raise ValueError("scheme=auto needs a budget; add bits=4.5")
        if self.method not in ("auto", *kind.methods):
            raise ValueError(
                f"method={self.method} does not suit scheme={self.scheme}; use {' or '.join(kind.methods)}"
            )
        if self.group_size is not None and (kind.fixed_group is not None or not self.takes_group_size):
            fixed = f"groups of {kind.fixed_group}" if kind.fixed_group else f"one scale a {kind.scales}"
            raise ValueError(f"scheme={self.scheme} has {fixed}; leave group_size out")
        if not self.symmetric and not self.takes_group_size:
            raise ValueError(f"scheme={self.scheme} is symmetric; leave symmetric out")
        return self

    @property
    def kind(self) -> Scheme:
        """The scheme's row in the table."""
        return SCHEMES[self.scheme]

    @property
    def takes_group_size(self) -> bool:
        """Whether the scheme leaves group size and symmetry open: weight-only integers."""
        return self.scheme in ("w4a16", "w8a16", "auto")

    @property
    def chosen_method(self) -> Method:
        """The method, with ``auto`` resolved."""
        return self.kind.methods[0] if self.method == "auto" else self.method

    @property
    def needs_calibration(self) -> bool:
        """Whether the model has to be run on text."""
        return self.chosen_method != "rtn" or self.kv_cache != "none" or self.scheme == "auto"
