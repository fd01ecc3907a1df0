"""Quality of a checkpoint: on which text it is measured, and the report of ``effcli eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from effcli.errors import BadInputError
from effcli.recipes import Calibration, Evaluation

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from profilers.text import TokenStream

DATASET_SPLITS = ("test", "validation", "train")
"""Which split of a data set is read where none is named: the first of these that it has."""

DATASET_CHARACTERS_PER_TOKEN = 16
"""Of a data set, this many characters are read for each token asked for; English has about 4 a token."""


class EvaluationText(NamedTuple):
    """What quality is measured on, and what passes may calibrate on.

    Attributes
    ----------
    calibration : TokenStream
        Shares no run of 32 tokens with the text of ``windows``.
    windows : torch.Tensor
        Shape (n, context), int64, on the CPU; no two overlap.
    name : str
        Of the text evaluated on, for reports.
    notes : tuple of str
        What the reader should know about the texts, one line each.
    """

    calibration: TokenStream
    windows: torch.Tensor
    name: str
    notes: tuple[str, ...]


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary_size: int,
    evaluation: Evaluation,
    calibration: Calibration,
    seed: int,
) -> EvaluationText:
    """Return the windows to evaluate on and a stream to calibrate on that shares nothing with their text.

    A window starts with a BOS token if the tokenizer adds one by itself, as the model then expects; it counts as one of
    its ``context`` tokens.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase or None
        Without one, tokens are random.
    vocabulary_size : int
    evaluation : Evaluation
        At most ``tokens`` tokens in windows of ``context``, evenly spaced over the text.
    calibration : Calibration
    seed : int
        Of random tokens.

    Raises
    ------
    BadInputError
        If a text or data set cannot be read, or both are given.
    profilers.base.ProfilerError
        If a text is too short.
    """
    import torch

    from profilers.text import adds_bos, split_texts

    if evaluation.text is not None and evaluation.dataset is not None:
        raise BadInputError("evaluation names both a text and a data set; leave one out")
    text: str | None = None
    name = ""
    if evaluation.dataset is not None:
        text, name = read_dataset(evaluation.dataset, evaluation.tokens * DATASET_CHARACTERS_PER_TOKEN)
    elif evaluation.text is not None:
        text, name = read_text(evaluation.text), evaluation.text.name
    split = split_texts(
        tokenizer,
        vocabulary_size,
        calibration_text=None if calibration.text is None else read_text(calibration.text),
        evaluation_text=text,
        seed=seed,
        calibration_name="" if calibration.text is None else calibration.text.name,
        evaluation_name=name,
    )
    notes = list(split.notes)
    bos = tokenizer is not None and adds_bos(tokenizer)
    length = evaluation.context - bos
    asked = max(1, evaluation.tokens // evaluation.context)
    windows = split.evaluation.separate_windows(asked, length)
    if windows.shape[0] < asked:
        notes.append(
            f"the text to evaluate on has {split.evaluation.ids.numel():,} tokens: {windows.numel():,} of the "
            f"{evaluation.tokens:,} asked for are used"
        )
    if bos:
        assert tokenizer is not None
        windows = torch.cat([torch.full((windows.shape[0], 1), tokenizer.bos_token_id), windows], dim=1)
        notes.append("every window starts with a BOS token, as the tokenizer adds it")
    return EvaluationText(split.calibration, windows, split.evaluation.name, tuple(notes))


def read_text(path: Path) -> str:
    """Read a text to measure or calibrate on.

    Raises
    ------
    BadInputError
        If the file cannot be read or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInputError(f"no text file at '{path}'") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"cannot read text file '{path}': {error}") from None
    if not text.strip():
        raise BadInputError(f"text file '{path}' is empty; give one with some thousand words")
    return text


def read_dataset(spec: str, characters: int) -> tuple[str, str]:
    """Read text from a data set, streamed, so that only what is used is fetched.

    Parameters
    ----------
    spec : str
        ``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT`` of the hub, or a folder. Default split: test, else
        validation, else train.
    characters : int
        How much to read at most, from the start.

    Returns
    -------
    tuple of str
        Rows of the column ``text``, or of its first column of text, joined by blank lines; and a name for reports.

    Raises
    ------
    BadInputError
        If ``datasets`` is not installed, or the data set cannot be reached, is not there or has no text.
    """
    import httpx

    try:
        import datasets
    except ImportError:
        raise BadInputError(
            f"--dataset '{spec}' needs the package datasets, which is not installed; pip install datasets"
        ) from None
    name, config, split = _parse_dataset(spec)
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, config, streaming=True)
        chosen = split or next((known for known in DATASET_SPLITS if known in found), None)
        if chosen is None or chosen not in found:
            raise BadInputError(f"data set '{spec}' has no split '{chosen or 'test'}'; it has: {', '.join(found)}")
        rows: list[str] = []
        read, column = 0, None
        for row in found[chosen]:
            column = column or next((key for key in ("text", *row) if isinstance(row.get(key), str)), None)
            if column is None:
                raise BadInputError(f"data set '{spec}' has no column of text; it has: {', '.join(row)}")
            rows.append(str(row[column]))
            read += len(rows[-1]) + 2
            if read >= characters:
                break
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, httpx.HTTPError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BadInputError(
            f"cannot read data set '{spec}': {first}; check the name and the network, or give --eval-text FILE"
        ) from None
    text = "\n\n".join(rows)
    if not text.strip():
        raise BadInputError(f"split '{chosen}' of data set '{spec}' has no text in column '{column}'")
    return text, ":".join(part for part in (Path(name).name if Path(name).exists() else name, config, chosen) if part)


def _parse_dataset(spec: str) -> tuple[str, str | None, str | None]:
    if Path(spec).exists():
        return spec, None, None
    parts = [part.strip() for part in spec.split(":")]
    if len(parts) > 3 or not parts[0]:
        raise BadInputError(f"--dataset '{spec}' is not NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
    name, config, split = (*parts, "", "")[:3]
    return name, config or None, split or None
