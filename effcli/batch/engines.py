"""The engine that the options of a command ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from effcli.errors import BadInputError, did_you_mean

if TYPE_CHECKING:
    from effcli.batch.engine import Engine

EngineName = Literal["local", "ray"]
NAMES: tuple[EngineName, ...] = ("local", "ray")


def check(name: str, address: str | None) -> None:
    """Refuse options that do not go together, before anything is done.

    Raises
    ------
    BadInputError
    """
    if name not in NAMES:
        raise BadInputError(f"engine '{name}' is neither of {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
    if address is not None and name != "ray":
        raise BadInputError(f"--address '{address}' is for --engine ray; add that, or leave --address out")


def engine_for(name: str, address: str | None, workers: int | None, *, share_cpus: bool = False) -> Engine:
    """Return an engine, not yet entered.

    Parameters
    ----------
    name : str
        ``local`` or ``ray``.
    address : str or None
        Of the Ray cluster; None for one that is started here.
    workers : int or None
        At a time, at most.
    share_cpus : bool
        Divide a cluster's CPUs between the workers, as those of this machine are; else each gets one.

    Raises
    ------
    BadInputError
        For options that do not go together, or more workers than this machine has cores.
    """
    check(name, address)
    if name == "ray":
        from effcli.batch.ray_engine import RayEngine

        return RayEngine(address, workers=workers, threads=None if share_cpus else 1)
    from effcli.batch.local import LocalEngine

    return LocalEngine(workers)
