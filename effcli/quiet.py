"""Keep transformers and diffusers from writing to the terminal, and show the progress of transformers as ours."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from profilers.base import SilentProgress

if TYPE_CHECKING:
    from profilers.base import Progress


@contextlib.contextmanager
def quiet_transformers(progress: Progress | None = None) -> Iterator[None]:
    """Silence transformers' logs, warnings, bars and prints inside the block; everything is as before after it.

    Its bars ("Loading weights", "Converting and de-quantizing GGUF tensors") move lines of ``progress`` instead.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging as hf_logging

    shown = progress or SilentProgress()

    with contextlib.ExitStack() as stack:

        class Bar(tqdm):  # type: ignore[misc]
            """A bar that draws nothing and moves a line of ``shown``, closed at the latest when the block ends."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **(kwargs | {"disable": True}))
                self._line = stack.enter_context(contextlib.ExitStack())
                description = str(kwargs.get("desc") or "loading").rstrip(". :").lower()
                self._task = self._line.enter_context(shown.task(description, self.total))

            def __iter__(self) -> Iterator[Any]:
                for item in self.iterable:
                    yield item
                    self.update()
                self.close()

            def update(self, n: float | None = 1) -> None:
                self._task.advance(n or 0)

            def close(self) -> None:
                self._line.close()
                super().close()

        verbosity = hf_logging.get_verbosity()
        stack.callback(hf_logging.set_verbosity, verbosity)
        hf_logging.set_verbosity_error()
        previous_hook = hf_logging.set_tqdm_hook(lambda factory, args, kwargs: Bar(*args, **kwargs))
        stack.callback(hf_logging.set_tqdm_hook, previous_hook)
        if hasattr(gguf_loader, "tqdm"):  # this one bar does not go through the hook
            stack.callback(setattr, gguf_loader, "tqdm", gguf_loader.tqdm)
            gguf_loader.tqdm = Bar
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


@contextlib.contextmanager
def quiet_diffusers(progress: Progress | None = None) -> Iterator[None]:
    """Do what :func:`quiet_transformers` does, and silence the logs and bars of diffusers as well.

    diffusers must be installed. The bar of a pipeline's own call is its own: ``pipeline.set_progress_bar_config``.
    """
    from diffusers.utils import logging as diffusers_logging

    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_transformers(progress))
        stack.callback(diffusers_logging.set_verbosity, diffusers_logging.get_verbosity())
        diffusers_logging.set_verbosity_error()
        if diffusers_logging.is_progress_bar_enabled():
            stack.callback(diffusers_logging.enable_progress_bar)
            diffusers_logging.disable_progress_bar()
        yield
