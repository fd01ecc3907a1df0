"""Make the classes of a looped checkpoint known to transformers, from this package: nothing of the folder is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from passes.base import PassError
from passes.loop.modeling_looped import PREFIX, TYPE_PREFIX, looped_classes
from passes.loop.modeling_looped import register as register_classes


def register(folder: Path) -> None:
    """Register the looped classes that a checkpoint's ``config.json`` names.

    Raises
    ------
    PassError
        If it names an architecture that transformers does not have.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_type = str(config.get("model_type"))
    if not model_type.startswith(TYPE_PREFIX):
        return
    name = str((config.get("architectures") or [""])[0])
    base, kind = name.removeprefix(PREFIX), model_type.removeprefix(TYPE_PREFIX)
    model_class = getattr(transformers, base, None) if name.startswith(PREFIX) else None
    if model_class is None or kind not in CONFIG_MAPPING:
        raise PassError(
            f"'{folder}' is a looped {base or kind}, which the installed transformers {transformers.__version__} does "
            "not have; install the one that its effcli.json names"
        )
    register_classes(*looped_classes(CONFIG_MAPPING[kind], model_class))
