"""What a model said about a text, kept so that another can be held against it when the first is no longer in memory.

Logits of T tokens over a vocabulary of V do not fit; the final hidden states do, and the head makes logits of them
again::

    record: ids ──> base model ──> hidden states (T x H a window), kept        V / H is 20 to 100
    replay: hidden states of some positions ──> the model's own forward, its base model replaced ──> logits (P x V)

The replay runs the architecture's own code, so soft caps, scales and biases of any head are applied by it. That it
gives what the model gives is checked on the first tokens of each recording.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from profilers import own_cache
from profilers.base import NotApplicableError, ProfilerError, Progress, SilentProgress
from profilers.phases import check_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "effcli.reference/1"
FORWARD_TOKENS = 2_048
"""Tokens in one forward of the base model, unless a single window is longer."""
CHECKED_TOKENS = 16
"""Tokens on which a replay is compared with the model's own forward."""
LOGITS_AT_ONCE = 1 << 22
"""Logits of one model that exist at a time, unless those of one position are more."""
_TENSORS, _HEAD, _META = "states.safetensors", "head.safetensors", "reference.json"
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class _StoredOutput:
    """What a base model returns, with nothing in it but the last hidden state."""

    def __init__(self, states: torch.Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _StoredStates(torch.nn.Module):
    """Stands where the base model was and returns the states it is given."""

    states: torch.Tensor

    @property
    def decoder(self) -> _StoredStates:
        """Of models whose head calls ``model.decoder`` (OPT, BART as a decoder)."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> _StoredOutput:
        """Return the states, whatever the arguments."""
        return _StoredOutput(self.states)


class Head:
    """All of a language model that comes after its base model, run by the model's own forward.

    It shares the modules with the model and leaves the model as it is.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder with a language-model head.

    Raises
    ------
    NotApplicableError
        For an encoder-decoder, or a model without a base model of its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        name = type(model).__name__
        if model.config.is_encoder_decoder:
            raise NotApplicableError(f"{name} is an encoder-decoder; quality on plain text is measured for decoders")
        prefix = model.base_model_prefix
        if not prefix or not isinstance(getattr(model, prefix, None), torch.nn.Module):
            raise NotApplicableError(f"{name} has no base model apart from its head, so its states cannot be kept")
        self._base = _StoredStates()
        self._model: Any = copy.copy(model)
        # Whatever was put on the instance (accelerate's forward, a compiled one, hooks) belongs to the whole model.
        own: dict[str, Any] = self._model.__dict__
        for key in ("forward", "_old_forward", "_hf_hook"):
            own.pop(key, None)
        own |= {"_modules": {**model._modules, prefix: self._base}, "_compiled_call_impl": None}
        own |= {hooks: OrderedDict() for hooks in _HOOKS}
        self._model.config = copy.deepcopy(model.config)
        self._model.config.output_router_logits = False

    @torch.no_grad()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits of final hidden states.

        Parameters
        ----------
        states : torch.Tensor
            Shape (P, H), on the device where the base model leaves them.

        Returns
        -------
        torch.Tensor
            Shape (P, vocabulary), in the dtype that the model gives.
        """
        self._base.states = states[None]
        ids = torch.zeros(1, states.shape[0], dtype=torch.long, device=states.device)
        try:
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False, return_dict=True).logits
        finally:
            del self._base.states
        return logits[0]

    @property
    def vocabulary_size(self) -> int:
        """How many tokens the model knows, by its config."""
        size: int = self._model.config.get_text_config(decoder=True).vocab_size
        return size

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the head, tied ones included, by the names that the whole model has them under."""
        tensors: dict[str, torch.Tensor] = self._model.state_dict()
        if any(tensor.device.type == "meta" for tensor in tensors.values()) and any(
            hasattr(module, "_hf_hook") for module in self._model.modules()
        ):
            from accelerate.utils.modeling import get_state_dict_offloaded_model

            tensors = get_state_dict_offloaded_model(self._model)  # weights that accelerate keeps elsewhere
        return tensors

    @property
    def module(self) -> torch.nn.Module:
        """The model with its base model replaced."""
        module: torch.nn.Module = self._model
        return module


@torch.no_grad()
def final_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return what the base model hands to the head, keys and values being as its cache would give them back.

    Parameters
    ----------
    model : PreTrainedModel
    ids : torch.Tensor
        Shape (B, T), on any device.

    Returns
    -------
    torch.Tensor
        Shape (B, T, H).
    """
    base = getattr(model, model.base_model_prefix)
    with own_cache.applied(model):
        output = base(input_ids=ids.to(_input_device(model)), use_cache=False, return_dict=True)
    states: torch.Tensor = output[0]
    return states


def checked_head(model: PreTrainedModel, ids: torch.Tensor) -> Head:
    """Return the model's head after checking, on the first tokens, that it gives what the model gives.

    Parameters
    ----------
    model : PreTrainedModel
    ids : torch.Tensor
        Shape (B, T).

    Raises
    ------
    NotApplicableError
        If the head is not a function of the final hidden states alone.
    """
    Head(model)  # refuses what has none
    few = ids[:1, :CHECKED_TOKENS].to(_input_device(model))
    with torch.no_grad(), own_cache.applied(model):
        expected = model(input_ids=few, use_cache=False, return_dict=True).logits[0].float()
    head = Head(model)  # again: a first forward may replace modules (weights that are decompressed then)
    name = type(model).__name__
    try:
        found = head.logits(final_states(model, few)[0]).float().to(expected.device)
    except (AttributeError, TypeError) as error:
        raise NotApplicableError(f"the head of {name} cannot be run on stored states: {error}") from error
    tolerance = 16 * torch.finfo(model.dtype).eps
    size = expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    if found.shape != expected.shape or not torch.allclose(
        found, expected, rtol=tolerance, atol=tolerance * size, equal_nan=True
    ):
        raise NotApplicableError(f"the head of {name} reads more than the final hidden states, so they cannot be kept")
    return head


def check_windows(model: PreTrainedModel, windows: torch.Tensor) -> None:
    """Refuse windows that the model cannot read.

    Raises
    ------
    ProfilerError
        If they are not (n, T) with T of 2 or more, are past the model's context, or hold ids it does not know.
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ProfilerError(f"windows have shape {tuple(windows.shape)}; quality needs (windows, 2 or more tokens)")
    check_context(model.config, windows.shape[1])
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    largest = int(windows.max())
    if largest >= vocabulary:
        raise ProfilerError(
            f"the text has token id {largest} but the model knows {vocabulary}; give the tokenizer that belongs to it"
        )


@dataclass(frozen=True)
class Reference:
    """Final hidden states of a model over windows of text, and its head.

    Attributes
    ----------
    windows : torch.Tensor
        Token ids, shape (n, T), int64, on the CPU.
    states : torch.Tensor
        Shape (n, T, H), in the model's dtype, on the CPU.
    head : Head
    device : torch.device
        Where the head takes states.
    """

    windows: torch.Tensor
    states: torch.Tensor
    head: Head
    device: torch.device

    def logits(self, window: int, start: int, stop: int) -> torch.Tensor:
        """Return the logits of positions ``start`` up to ``stop`` of a window, shape (stop - start, vocabulary)."""
        return self.head.logits(self.states[window, start:stop].to(self.device))

    def save(self, folder: Path) -> None:
        """Write the reference into a folder, which is made if it is not there: safetensors and JSON.

        Raises
        ------
        NotApplicableError
            If the head is of another kind than its config says (a quantized one).
        """
        from safetensors.torch import save_file

        model: Any = self.head.module
        tensors = self.head.state_dict()
        with torch.device("meta"):
            expected = Head(type(model)(copy.deepcopy(model.config))).state_dict()
        if {name: item.shape for name, item in tensors.items()} != {
            name: item.shape for name, item in expected.items()
        }:
            raise NotApplicableError(
                f"the head of {type(model).__name__} is not the one its config describes (it may be quantized), so it "
                "cannot be saved; keep the reference in memory"
            )
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"windows": self.windows, "states": self.states.contiguous()}, folder / _TENSORS)
        # Copies, since safetensors refuses tensors that share memory.
        save_file({name: item.detach().cpu().contiguous().clone() for name, item in tensors.items()}, folder / _HEAD)
        config = copy.deepcopy(model.config)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        config.save_pretrained(folder)
        about = {"format": FORMAT, "dtype": str(model.dtype).removeprefix("torch."), "class": type(model).__name__}
        (folder / _META).write_text(json.dumps(about) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", *, trust_remote_code: bool = False) -> Reference:
        """Read a reference back.

        Parameters
        ----------
        folder : Path
        device : torch.device or str
            Where the head goes.
        trust_remote_code : bool
            Run modelling code that comes with the model.

        Raises
        ------
        ProfilerError
            If a file is missing, damaged or of another format.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import AutoConfig

        try:
            about = json.loads((folder / _META).read_text(encoding="utf-8"))
            if about.get("format") != FORMAT:
                raise ValueError(f"its format is {about.get('format')!r}, this release reads {FORMAT!r}")
            kept = load_file(folder / _TENSORS)
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
            model = _on_meta(config, getattr(torch, about["dtype"]), trust_remote_code=trust_remote_code)
            head = Head(model)
            head.module.load_state_dict(load_file(folder / _HEAD), assign=True)
            head.module.to(device)
            return cls(kept["windows"], kept["states"], head, torch.device(device))
        except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, SafetensorError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ProfilerError(f"cannot read the reference in '{folder}': {first}; record it again") from error


def record_reference(model: PreTrainedModel, windows: torch.Tensor, *, progress: Progress | None = None) -> Reference:
    """Run a model over windows of text once and keep what is needed to have its logits again.

    Memory: T x H elements a window, in the model's dtype, on the CPU; the head stays where it is and is shared with the
    model, so a model that is dropped afterwards leaves its head (the tied embedding, if there is one) and nothing else.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder, in evaluation mode.
    windows : torch.Tensor
        Token ids, shape (n, T).
    progress : Progress or None

    Raises
    ------
    NotApplicableError
        For an encoder-decoder, or a head that reads more than the final hidden states.
    ProfilerError
        For windows that the model cannot read.
    """
    check_windows(model, windows)
    head = checked_head(model, windows)
    states = []
    device = torch.device("cpu")
    with (progress or SilentProgress()).task("Reference", total=windows.shape[0]) as task:
        for batch in torch.split(windows, batch_size(windows)):
            found = final_states(model, batch)
            device = found.device
            states.append(found.cpu())
            task.advance(batch.shape[0])
    return Reference(windows.cpu(), torch.cat(states), head, device)


def positions_at_once(head: Head) -> int:
    """Return of how many positions the logits may exist at a time."""
    return max(1, LOGITS_AT_ONCE // head.vocabulary_size)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-softmax over the vocabulary, in float32 (float64 for float64 logits)."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def batch_size(windows: torch.Tensor) -> int:
    """Return how many windows go through the base model at a time."""
    return max(1, FORWARD_TOKENS // windows.shape[1])


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _on_meta(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model.eval()


def _input_device(model: PreTrainedModel) -> torch.device:
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device  # offloaded: accelerate moves the inputs
