"""Read GGUF files: what they hold, and the model and tokenizer that transformers makes of them.

transformers dequantizes every weight. What it gets wrong about the tokenizer (special tokens, the splitting of digits,
spaces and ``▁`` in decoded text) is put right here from the file's own metadata.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.errors import SourceError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_FLOAT_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


@dataclass(frozen=True)
class GgufFacts:
    """What a GGUF file's header says.

    Attributes
    ----------
    architecture : str
        ``general.architecture``, ``"llama"``.
    elements : dict of str to int
        Number of weights by GGML type name, ``{"Q4_1": 106168320, "F32": 35136}``.
    special_tokens : dict of str to str
        transformers' name of a special token to its text.
    tokenizer_model : str or None
        ``"gpt2"`` (BPE over bytes), ``"llama"`` (SentencePiece), ...
    pre_tokenizer : str or None
        llama.cpp's name of the rule that splits text before BPE.
    """

    architecture: str
    elements: dict[str, int]
    special_tokens: dict[str, str]
    tokenizer_model: str | None
    pre_tokenizer: str | None

    @property
    def quantized(self) -> str:
        """The quantized types, most weights first: ``"Q4_1, Q8_0"``; empty where there are none."""
        ranked = sorted(self.elements, key=lambda name: -self.elements[name])
        return ", ".join(name for name in ranked if name not in _FLOAT_TYPES)

    @property
    def stored_dtype(self) -> str | None:
        """PyTorch's name of the floating-point type that most weights have, None in a quantized file."""
        return None if self.quantized else _FLOAT_TYPES[max(self.elements, key=lambda name: self.elements[name])]


def read_facts(path: Path) -> GgufFacts:
    """Read the header of a GGUF file and check that every tensor it names lies inside the file.

    Raises
    ------
    SourceError
        If the file is truncated, damaged or one part of several.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        architecture = _value(reader, "general.architecture")
        if not isinstance(architecture, str):
            raise SourceError(f"'{path}' names no general.architecture, so it is no model")
        parts = _value(reader, "split.count") or 1
        if parts > 1:
            raise SourceError(f"'{path}' is one of {parts} parts; merge them first with: llama-gguf-split --merge")
        elements: Counter[str] = Counter()
        end = 0
        for tensor in reader.tensors:
            elements[tensor.tensor_type.name] += int(tensor.n_elements)
            end = max(end, int(tensor.data_offset) + int(tensor.n_bytes))
        special_tokens = {}
        for name, token in _SPECIAL_TOKENS.items():
            index = _value(reader, f"tokenizer.ggml.{name}_token_id")
            if index is not None:
                special_tokens[token] = str(reader.fields["tokenizer.ggml.tokens"].contents(int(index)))
        tokenizer_model = _value(reader, "tokenizer.ggml.model")
        pre_tokenizer = _value(reader, "tokenizer.ggml.pre")
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise SourceError(f"'{path}' is truncated or damaged ({error}); fetch it again") from None
    if end > path.stat().st_size or not elements:
        raise SourceError(f"'{path}' is truncated: its tensors end at byte {end:,}; fetch it again")
    return GgufFacts(architecture, dict(elements), special_tokens, tokenizer_model, pre_tokenizer)


def _value(reader: Any, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def load_config(path: Path) -> PreTrainedConfig:
    """Make the transformers config of a GGUF file from its metadata."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path.parent, gguf_file=str(path), local_files_only=True)


def load_model(
    path: Path, auto: type[Any], config: PreTrainedConfig, dtype: torch.dtype, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the weights of a GGUF file, dequantized, as an ordinary transformers model that can be saved.

    Returns
    -------
    PreTrainedModel
    dict
        transformers' loading info.
    """
    import transformers

    if hasattr(transformers, "GgufConfig"):  # newer releases keep the blocks packed unless told not to
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = auto.from_pretrained(
        path.parent, gguf_file=str(path), config=config, dtype=dtype, output_loading_info=True, **options
    )
    _forget_quantization(model)
    return model, info


def _forget_quantization(model: PreTrainedModel) -> None:
    """Remove what transformers leaves on a dequantized model and then refuses to save it for."""
    for holder, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
    ):
        if name in vars(holder):
            delattr(holder, name)


def load_tokenizer(path: Path, facts: GgufFacts) -> PreTrainedTokenizerBase:
    """Make the tokenizer of a GGUF file, with the special tokens and the splitting rule that its metadata names."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=str(path), local_files_only=True)
    for name, token in facts.special_tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.clean_up_tokenization_spaces = False  # GGUF does not know this flag, and on BPE it damages text
    if facts.tokenizer_model == "gpt2":  # its bytes need no other decoder; transformers adds SentencePiece's
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    if facts.pre_tokenizer == "smollm":  # each digit alone before GPT-2's rule, as in llama.cpp
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    return tokenizer
