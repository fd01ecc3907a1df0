"""What a model is exported for, and the inputs that it is traced with: from optimum where it knows, else the config."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from effcli.errors import BadInputError, did_you_mean
from effcli.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

TEXT_GENERATION = "text-generation"
ENCODER_TASKS = (
    "feature-extraction",
    "fill-mask",
    "text-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
)
TASKS = (TEXT_GENERATION, *ENCODER_TASKS[:-1])
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_SAMPLE_BATCH, _SAMPLE_LENGTH = 2, 5


def check_task(task: str) -> None:
    """Refuse a task that nothing here exports.

    Raises
    ------
    BadInputError
    """
    if task != "auto" and task not in TASKS:
        raise BadInputError(f"--task '{task}' is not known{did_you_mean(task, TASKS)}; known: auto, {', '.join(TASKS)}")


def task_of(config: PreTrainedConfig) -> tuple[str, str]:
    """Return the task that a checkpoint's architecture is for, and how that is known.

    Parameters
    ----------
    config : PreTrainedConfig

    Raises
    ------
    BadInputError
        If it is for a task that nothing here exports.
    """
    import transformers

    architecture = next(iter(config.architectures or ()), None)
    known = getattr(transformers, architecture, None) if architecture else None
    if architecture is None or known is None:
        return TEXT_GENERATION, "the config names no architecture of transformers"
    try:
        with quiet_transformers():
            from optimum.exporters.tasks import TasksManager

            task = str(TasksManager.infer_task_from_model(known))
        reason = f"optimum: {architecture}"
    except (ImportError, ValueError, KeyError, AttributeError):
        task = TEXT_GENERATION if architecture.endswith(("ForCausalLM", "LMHeadModel")) else "feature-extraction"
        reason = f"{architecture}, by its name: optimum is not installed or does not know it"
    if config.is_encoder_decoder:
        raise BadInputError(
            f"{architecture} has an encoder and a decoder, which 'effcli export' does not write yet; "
            "give a decoder-only or an encoder-only model"
        )
    if task not in TASKS:
        raise BadInputError(f"{architecture} is for '{task}', and 'effcli export' knows: {', '.join(TASKS)}")
    return task, reason


def auto_class(task: str, config: PreTrainedConfig, *, asked: bool) -> Any:
    """Return the class that loads an encoder for a task: the checkpoint's own, unless another task was asked for."""
    import transformers
    from transformers import AutoModel

    own = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if own is not None and not asked:
        return own
    by_task = {
        "fill-mask": transformers.AutoModelForMaskedLM,
        "text-classification": transformers.AutoModelForSequenceClassification,
        "token-classification": transformers.AutoModelForTokenClassification,
        "question-answering": transformers.AutoModelForQuestionAnswering,
    }
    return by_task.get(task, AutoModel)


def dummy_inputs(model: PreTrainedModel, task: str) -> tuple[dict[str, torch.Tensor], str]:
    """Return inputs of shape (batch, sequence) to trace an encoder with, and where they come from.

    Parameters
    ----------
    model : PreTrainedModel
    task : str
    """
    import torch

    takes = [name for name in _INPUTS if name in inspect.signature(model.forward).parameters]
    if "token_type_ids" in takes and not getattr(model.config, "type_vocab_size", 0):
        takes.remove("token_type_ids")
    generator, source = _optimum_generator(model.config, task)
    if generator is not None:
        made = {name: generator.generate(name, framework="pt") for name in takes}
    else:
        shape = (_SAMPLE_BATCH, _SAMPLE_LENGTH)
        made = {name: torch.zeros(shape, dtype=torch.long) for name in takes}
        made["input_ids"] += 1
    if "attention_mask" in made:
        made["attention_mask"] = torch.ones_like(made["input_ids"])
    if "token_type_ids" in made:
        made["token_type_ids"] = torch.zeros_like(made["input_ids"])
    return made, source


def _optimum_generator(config: Any, task: str) -> tuple[Any, str]:
    unknown = f"dummy inputs come from the config: optimum does not know '{config.model_type}'"
    try:
        from optimum.utils import NormalizedConfigManager
        from optimum.utils.input_generators import DummyTextInputGenerator

        normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        generator = DummyTextInputGenerator(task, normalized, batch_size=_SAMPLE_BATCH, sequence_length=_SAMPLE_LENGTH)
    except (ImportError, KeyError, AttributeError, ValueError):
        return None, unknown
    return generator, "dummy inputs come from optimum"
