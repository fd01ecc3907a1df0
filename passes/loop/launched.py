"""Healing in several processes, one a GPU, started by accelerate's launcher.

::

    parent: models, text, settings ──files──> accelerate launch ──> N processes: heal(), gradients averaged
            Progress <── first process's standard output, one JSON object a line
            weights, what was done <── files, renamed into place ── first process

State is saved in the pass's own folder as by one process, so either goes on with what the other left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from passes.base import PassError
from passes.loop.training import CurvePoint, Settings, Trained
from profilers.base import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = "launched"
JOB, TEXT, WEIGHTS, RESULT = "job.json", "text.safetensors", "healed.safetensors", "result.json"
ORIGINAL, LOOPED = "original", "looped"
LAST_LINES = 12
"""Of what a failed launch printed, in the error."""


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    settings: Settings,
    work: Path,
    *,
    processes: int,
    names: Literal["deltas", "all"] = "all",
    label_weight: float = 0.0,
    seed: int = 0,
    progress: Progress,
) -> Trained:
    """Do what :func:`passes.loop.heal.heal` does, in several processes.

    Parameters
    ----------
    student, teacher, ids, settings, work, names, label_weight, seed, progress
        As there. On a GPU each process takes one; on the CPU they share it.
    processes : int

    Raises
    ------
    PassError
        If healing fails; or the launcher does, with the last lines that it printed.
    """
    import shutil

    from safetensors.torch import load_file, save_file

    folder = work / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    teacher.save_pretrained(folder / ORIGINAL)
    student.save_pretrained(folder / LOOPED)
    save_file({"ids": ids.contiguous()}, folder / TEXT)
    job = {
        "settings": asdict(settings),
        "work": str(work),
        "device": student.device.type,
        "dtype": str(student.dtype).removeprefix("torch."),
        "attention": student.config._attn_implementation,
        "names": names,
        "label_weight": label_weight,
        "seed": seed,
    }
    (folder / JOB).write_text(json.dumps(job), encoding="utf-8")
    _launch(folder, processes, settings.steps, progress)
    said = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    if "error" in said:
        raise PassError(said["error"])
    weights = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    shutil.rmtree(folder)
    return Trained(**{**said, "curve": tuple(CurvePoint(**point) for point in said["curve"])})


def _launch(folder: Path, processes: int, steps: int, progress: Progress) -> None:
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        "--multi_gpu",  # processes of one machine; what each runs on is said in main()
        *("--module", "passes.loop.launched", str(folder)),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    last: list[str] = []
    with (
        subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, encoding="utf-8", errors="replace",
        ) as running,
        progress.task(f"healing in {processes} processes", total=steps) as task,
    ):  # fmt: skip
        assert running.stdout is not None
        try:
            for line in running.stdout:
                said = _message(line)
                if said is None:
                    last = [*last, line.rstrip()][-LAST_LINES:]
                    continue
                task.advance(said["advance"])
                if said["text"]:
                    task.describe(said["text"])
        except BaseException:
            running.terminate()  # the first process saves its state on the signal that the terminal sent, or earlier
            raise
    if not (folder / RESULT).is_file():
        shown = "\n".join(last)
        raise PassError(f"healing in {processes} processes ended with status {running.returncode}:\n{shown}")


def _message(line: str) -> dict[str, Any] | None:
    """Return what the first process reported; None for any other line."""
    try:
        said = json.loads(line)
    except json.JSONDecodeError:
        return None
    return said if isinstance(said, dict) and {"advance", "text"} <= said.keys() else None


class _Reporting:
    """Progress of the first process, told to the parent."""

    def task(self, description: str, total: float | None = None) -> _Reporting:
        return self

    def __enter__(self) -> _Reporting:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def advance(self, steps: float = 1.0) -> None:
        self._tell(steps, "")

    def describe(self, text: str) -> None:
        self._tell(0, text)

    @staticmethod
    def _tell(advance: float, text: str) -> None:
        sys.stdout.write(json.dumps({"advance": advance, "text": text}) + "\n")
        sys.stdout.flush()


def main(folder: Path) -> None:
    """Heal as one of the processes that the launcher started."""
    from accelerate import Accelerator
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from passes.loop import heal as healing
    from passes.loop.known import register
    from profilers.base import SilentProgress

    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    accelerator = Accelerator(cpu=job["device"] == "cpu")
    register(folder / LOOPED)
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(
            folder / part, dtype=getattr(torch, job["dtype"]), attn_implementation=job["attention"]
        )
        .to(accelerator.device)
        .eval()
        for part in (ORIGINAL, LOOPED)
    )
    result: dict[str, Any]
    try:
        done = healing.heal(
            student, teacher, load_file(folder / TEXT)["ids"], Settings(**job["settings"]), Path(job["work"]),
            names=job["names"], label_weight=job["label_weight"], seed=job["seed"],
            progress=_Reporting() if accelerator.is_main_process else SilentProgress(),
        )  # fmt: skip
        result = asdict(done)
    except PassError as error:  # every process comes to it: they agree on the loss
        result = {"error": str(error)}
    if accelerator.is_main_process:
        if "error" not in result:
            trained = healing.trainable(student, job["names"])
            parameters = dict(student.named_parameters())
            save_file({name: parameters[name].detach().cpu().contiguous() for name in trained}, folder / WEIGHTS)
        partial = folder / f"{RESULT}.partial"
        partial.write_text(json.dumps(result), encoding="utf-8")
        partial.replace(folder / RESULT)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
