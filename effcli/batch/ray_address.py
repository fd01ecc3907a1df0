"""Connecting to a Ray cluster, with an answer in seconds where there is none."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

from effcli.errors import BadInputError

ANSWER_SECONDS = 7.0
"""How long an address has to answer; Ray itself tries for two minutes and then ends the process."""
OBJECT_STORE_BYTES = 128 * 2**20
"""Of a cluster that is started here: only events pass through it."""


def connect(address: str | None) -> None:
    """Connect to a cluster, or start one where ``address`` is None; fail in words and in time.

    Raises
    ------
    BadInputError
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "effcli"}
    if address is None:
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 without, which slows what is measured beside other work
        ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **options)
        return
    shown = "" if address != "auto" else os.environ.get("RAY_ADDRESS", "")
    real = shown or address
    if real != "auto" and not _answers(real):
        origin = " (from RAY_ADDRESS)" if shown else ""
        raise BadInputError(
            f"no Ray cluster answers at '{real}'{origin} within {ANSWER_SECONDS:.0f} s; check "
            "host and port (6379 for host:port, 10001 for ray://host:port), or use --engine local"
        )
    try:
        ray.init(real, **options)
    except (ConnectionError, RuntimeError, ValueError, SystemExit, ray.exceptions.RayError) as error:
        if real == "auto":
            raise BadInputError(
                "no Ray cluster runs on this machine; start one with `ray start --head`, give --address host:port, or "
                "use --engine local"
            ) from None
        raise BadInputError(f"cannot use the Ray cluster at '{real}': {said_by_ray(error)}") from None


def _answers(address: str) -> bool:
    """Say whether something that speaks gRPC, as Ray's servers do, answers at an address in time.

    Raises
    ------
    BadInputError
        If it is no address.
    """
    import grpc  # type: ignore[import-untyped]

    if re.fullmatch(r"(ray://)?[^/\s]+:\d{1,5}", address) is None:
        raise BadInputError(f"address '{address}' is neither auto, host:port nor ray://host:port")
    channel = grpc.insecure_channel(address.removeprefix("ray://"))
    try:
        grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
    except grpc.FutureTimeoutError:
        return False
    else:
        return True
    finally:
        channel.close()


def said_by_ray(error: BaseException) -> str:
    """Return what an error of Ray's says, without the table and the logs that follow."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if type(error).__name__ == "RayTaskError":
        return lines[-1]
    return next((line for line in lines if "because" in line), lines[0])
