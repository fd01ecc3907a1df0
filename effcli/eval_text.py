"""Text to measure or calibrate on: from a file, or from a data set when the user asks for one."""

from __future__ import annotations

from pathlib import Path

from effcli.errors import BadInputError

DATASET_SPLITS = ("test", "validation", "train")
"""Which split of a data set is read where none is named: the first of these that it has."""

DATASET_CHARACTERS_PER_TOKEN = 16
"""Of a data set, this many characters are read for each token asked for; English has about 4 a token."""


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
