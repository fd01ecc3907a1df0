"""effcli: says where a model's time and bytes go on the device you have.

>>> import effcli
>>> report = effcli.profile("smollm2-135m", only=("kv",))  # doctest: +SKIP

Importing this package imports neither torch nor transformers; the functions do when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effcli.api import load, load_report, profile
    from effcli.diffusion.loading import load_pipeline
    from effcli.diffusion.profile import profile_pipeline
    from effcli.pipeline import optimize
    from effcli.planning import plan
    from effcli.recipes import Recipe
    from effcli.reports.model import ProfileReport
    from passes.loop.depth_batched import depth_batched

    __version__: str

__all__ = [
    "ProfileReport",
    "Recipe",
    "__version__",
    "depth_batched",
    "load",
    "load_pipeline",
    "load_report",
    "optimize",
    "plan",
    "profile",
    "profile_pipeline",
]

_LAZY = {
    "profile": "effcli.api",
    "load": "effcli.api",
    "load_pipeline": "effcli.diffusion.loading",
    "profile_pipeline": "effcli.diffusion.profile",
    "load_report": "effcli.api",
    "optimize": "effcli.pipeline",
    "plan": "effcli.planning",
    "Recipe": "effcli.recipes",
    "depth_batched": "passes.loop.depth_batched",
    "ProfileReport": "effcli.reports.model",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that ``import effcli`` stays cheap."""
    value: Any
    if name == "__version__":
        from importlib.metadata import version

        value = version("effcli")
    elif name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module 'effcli' has no attribute '{name}'")
    globals()[name] = value
    return value
