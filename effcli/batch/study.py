"""Optuna behind a search: whether it is there, and the study in its storage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.batch.search_space import SearchSpec
from effcli.errors import BadInputError

if TYPE_CHECKING:
    from optuna.study import Study

STORAGE_FILE = "search.sqlite"


def optuna_for(search: str) -> Any:
    """Import Optuna, and keep it quiet: the batch says what happens."""
    try:
        import optuna
    except ImportError:
        raise BadInputError(f"search '{search}' needs Optuna; install it: pip install 'effcli[search]'") from None
    if not hasattr(optuna.trial.Trial, "set_constraint"):
        raise BadInputError(
            f"search '{search}' needs Optuna 5 and finds {optuna.__version__}; pip install -U 'effcli[search]'"
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def open_study(search: str, spec: SearchSpec, study_name: str, folder: Path) -> Study:
    """Open a search's study, new or as earlier runs left it.

    Parameters
    ----------
    search : str
        Its name, for messages.
    spec : SearchSpec
    study_name : str
    folder : Path
        Of the SQLite file that is used where the spec names no storage.

    Raises
    ------
    BadInputError
        If Optuna is missing, or the storage cannot be opened.
    """
    optuna = optuna_for(search)
    storage = spec.storage
    direction = "minimize" if spec.minimize is not None else "maximize"
    try:
        if storage is None:
            folder.mkdir(parents=True, exist_ok=True)
            storage = f"sqlite:///{folder / STORAGE_FILE}"
        study: Study = optuna.create_study(
            study_name=study_name, storage=storage, direction=direction, load_if_exists=True
        )
        return study
    except Exception as error:  # noqa: BLE001 - each storage has errors of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInputError(
            f"search '{search}' cannot open its storage '{_shown(str(storage))}': {_shown(reason)}; write an "
            "Optuna storage URL like sqlite:////folder/search.sqlite, or leave storage out"
        ) from None


def _shown(text: str) -> str:
    """Return a text without the password of a URL."""
    return re.sub(r"(://[^:/@\s]*):[^@/\s]+@", r"\1:…@", text)
