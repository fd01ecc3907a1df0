"""Exported models that are used as transformers' own are: called, and asked to generate.

::

    transformers' generate ──ids, mask, positions, cache──> OnnxCausalLM.forward ──> decode.onnx ──> logits, cache

Prompts go through the decode graph, too, with an empty cache: then there is one session, and the weights, which ONNX
Runtime repacks for its kernels, are in memory once. Long prompts go through it in chunks, so that neither the logits
of all their positions nor a square of attention has to fit the memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from effcli.errors import BadInputError
from effcli.export.graphs import LAST_LOGITS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from effcli.export.session import Graph
    from profilers.weights import WeightSize

CHUNK = 512
"""Tokens of a prompt that go through the graph at once where only the last logits are wanted."""


class OnnxModel(torch.nn.Module):
    """A model whose forward pass is an ONNX graph.

    Parameters
    ----------
    graph : Graph
    config : PreTrainedConfig
    architecture : str
        Class of the model that was exported.
    task : str
        ``text-generation``, ``feature-extraction``, …
    dtype : torch.dtype
    weights : WeightSize

    Attributes
    ----------
    notes : tuple of str
        Which runtime and provider run it, and why; one line each.
    """

    main_input_name = "input_ids"
    generates = False
    runtime = "ONNX Runtime"
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        graph: Graph,
        config: PreTrainedConfig,
        *,
        architecture: str,
        task: str,
        dtype: torch.dtype,
        weights: WeightSize,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.config = config
        self.architecture = architecture
        self.task = task
        self.dtype = dtype
        self.weight_size = weights
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where it runs, and its outputs are."""
        return self.graph.device

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs: Any
    ) -> ModelOutput:
        """Run the graph.

        Parameters
        ----------
        input_ids : torch.Tensor
            Shape (batch, sequence).
        attention_mask : torch.Tensor or None
            Same shape; None: all ones.
        **inputs
            Whatever else the graph takes (``token_type_ids``: zeros where it is not given).

        Returns
        -------
        ModelOutput
            By name of the graph's outputs, ``last_hidden_state``.
        """
        feeds = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        feeds |= {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        if attention_mask is not None:
            feeds["attention_mask"] = attention_mask
        for name in self.graph.inputs:
            feeds.setdefault(name, torch.zeros_like(input_ids))
        return ModelOutput(self.graph.run(feeds))

    def generate(self, *_: Any, **__: Any) -> Any:
        """Refuse: only language models with a cache generate."""
        raise BadInputError(
            f"{self.architecture} was exported for {self.task} and does not generate text; call the model itself"
        )


class OnnxCausalLM(OnnxModel, GenerationMixin):  # type: ignore[misc]
    """A language model whose steps are an ONNX graph; ``generate`` is transformers' own.

    Greedy search, sampling, beam search, left-padded batches, streamers and stopping criteria work as they do there.
    """

    _is_stateful = False
    base_model_prefix = ""
    generates = True
    generate = GenerationMixin.generate

    def __init__(self, graph: Graph, config: PreTrainedConfig, generation: GenerationConfig, **described: Any) -> None:
        super().__init__(graph, config, **described)
        self.generation_config = generation
        layers = sum(name.startswith("present.") for name in graph.outputs) // 2
        parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
        self._present = tuple(f"present.{part}" for part in parts)
        self._past = tuple(f"past_key_values.{part}" for part in parts)
        self._takes_cache = self._past[0] in graph.inputs

    def can_generate(self) -> bool:
        """Say that ``generate`` works."""
        return True

    def is_remote_code(self) -> bool:
        """Say that nothing here came with a checkpoint."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Say that there are no experts whose kernel could be changed."""
        return {}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # it makes its own, in which every layer grows: a sliding window is left to the graph's mask

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Run the graph on the next tokens.

        Parameters
        ----------
        input_ids : torch.Tensor
            Shape (batch, sequence).
        attention_mask : torch.Tensor or None
            Shape (batch, cached + sequence); None: all ones.
        position_ids : torch.Tensor or None
            Shape (batch, sequence); None: counted over the mask.
        past_key_values : DynamicCache or None
            What an earlier call returned; it is extended in place.
        logits_to_keep : int
            Of the last so many positions; 0: of all.
        use_cache : bool or None
            False: do not return the cache.
        return_dict : bool or None
            Accepted for transformers' sake.

        Raises
        ------
        BadInputError
            For a cache of another kind than transformers' default.
        """
        cache = DynamicCache() if past_key_values is None else past_key_values
        self._check_cache(cache)
        held = cache.get_seq_length()
        batch, length = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(batch, held + length, dtype=torch.int64, device=self.device)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
        position_ids = position_ids.expand(batch, -1)
        whole = logits_to_keep == 0 or not self._takes_cache
        chunk = length if whole else max(CHUNK, logits_to_keep)
        # The last chunk is a whole one: the logits that are kept are all in it.
        ends = [*range(length, 0, -chunk)][::-1]
        start = 0
        for end in ends:
            logits = self._step(
                cache, input_ids[:, start:end], attention_mask[:, : held + end], position_ids[:, start:end],
                min(logits_to_keep, end - start),
            )  # fmt: skip
            start = end
        return CausalLMOutputWithPast(logits=logits, past_key_values=None if use_cache is False else cache)

    def _step(
        self,
        cache: DynamicCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        keep: int,
    ) -> torch.Tensor:
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if LAST_LOGITS in self.graph.optional or LAST_LOGITS in self.graph.inputs:
            feeds[LAST_LOGITS] = torch.tensor(keep)
        if not self._takes_cache:
            pass
        elif cache.get_seq_length():
            tensors = (part for layer in cache.layers for part in (layer.keys, layer.values))
            feeds |= dict(zip(self._past, tensors, strict=True))
        else:
            feeds |= {name: self._no_past(name, input_ids.shape[0]) for name in self._past}
        found = self.graph.run(feeds)
        if not cache.layers:
            for index in range(0, len(self._present), 2):
                cache.update(*(found[name][:, :, :0] for name in self._present[index : index + 2]), index // 2)
        for index, layer in enumerate(cache.layers):
            layer.keys, layer.values = (found[name] for name in self._present[2 * index : 2 * index + 2])
        logits = found["logits"]
        return logits[:, -keep:] if keep else logits

    def _check_cache(self, cache: DynamicCache) -> None:
        if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise BadInputError(
                f"an exported model keeps a DynamicCache without sliding layers, not this {type(cache).__name__}; "
                "leave past_key_values and cache_implementation out"
            )
        if cache.get_seq_length() and not self._takes_cache:
            raise BadInputError("this graph is the prefill's, which takes no cache; open 'decode'")

    def _no_past(self, name: str, batch: int) -> torch.Tensor:
        expected = self.graph.inputs[name]
        _, heads, _, size = expected.shape
        return torch.empty(batch, int(heads), 0, int(size), dtype=expected.dtype, device=self.device)
