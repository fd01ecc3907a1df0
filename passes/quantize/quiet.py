"""Keep llm-compressor's log lines, bars and warnings off the terminal while a pass runs."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from passes.base import MissingExtraError

_SWITCH = "LLM_COMPRESSOR_LOG_DISABLED"
_METRIC = "METRIC"  # a log level that llm-compressor uses, and defines only where it sets up logging
_silenced: list[bool] = []  # not empty where the libraries were imported here, and so never logged
_TORCH_LOGGER = "torch.fx._symbolic_trace"  # warns on every trace that a function of its own is deprecated
_LOGGERS = ("llmcompressor", "compressed_tensors")


def require_extra() -> None:
    """Import llm-compressor and compressed-tensors without letting them set up logging.

    Raises
    ------
    MissingExtraError
        Naming the command that installs them.
    """
    if "llmcompressor" in sys.modules:
        return
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "true"
    try:
        import compressed_tensors  # noqa: F401
        import llmcompressor  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"quantizing needs llm-compressor ({error}); pip install 'effcli[quantize]'") from None
    finally:
        os.environ.pop(_SWITCH)
        if before is not None:
            os.environ[_SWITCH] = before
    _silenced.append(True)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence loguru, tqdm and warnings of the quantization libraries inside the block."""
    import tqdm  # type: ignore[import-untyped]
    from loguru import logger
    from transformers.utils import logging as hf_logging

    with contextlib.suppress(ValueError, TypeError):  # raised where the level exists
        logger.level(_METRIC, no=38)
    original = tqdm.tqdm.__init__

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **(kwargs | {"disable": True}))

    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    with contextlib.ExitStack() as stack:
        for name in _LOGGERS:
            logger.disable(name)
            if not _silenced:
                stack.callback(logger.enable, name)
        tracing = logging.getLogger(_TORCH_LOGGER)
        stack.callback(tracing.setLevel, tracing.level)
        tracing.setLevel(logging.ERROR)
        tqdm.tqdm.__init__ = silent
        stack.callback(setattr, tqdm.tqdm, "__init__", original)
        hf_logging.set_verbosity_error()
        stack.callback(hf_logging.set_verbosity, verbosity)
        hf_logging.disable_progress_bar()
        if bars:
            stack.callback(hf_logging.enable_progress_bar)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield
