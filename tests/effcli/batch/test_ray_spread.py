"""Parts of a pass on a real Ray cluster of two nodes, one of which is killed at its part."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from effcli.batch import driver, machine
from effcli.batch.fingerprint import Fingerprints
from effcli.batch.ray_engine import RayEngine
from effcli.batch.spread import EngineSpread
from effcli.checkpoint_files import sha256_of
from effcli.staging import folder_for
from passes.base import PassContext, PassDoesNotFitError, PassError
from passes.lemica.graph import build
from passes.quantize import targets
from passes.quantize.parameters import QuantizeParameters
from passes.quantize.sensitivity import Allocation, allocate
from tests.conftest import Run
from tests.effcli.batch.killable import calls
from tests.effcli.batch.ray_cluster import is_alive, two_nodes, wait_for
from tests.passes.lemica.test_spreading import ASKED, OPENING, SAMPLES, opened
from tests.passes.quantize.compressed import tiny_llama
from tests.passes.quantize.test_spreading import TEXT

pytest.importorskip("ray", reason="ray is not installed: pip install 'effcli[ray]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as made:
        yield made


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def on_ray(cluster: Any, folder: Path) -> EngineSpread:
    return EngineSpread(RayEngine(cluster.address, threads=None), folder)


def allocation(work: Path, spread: EngineSpread | None = None, function: str = "") -> Allocation:
    """Return what quantize measures, its parts' models from ``function``."""
    opening = {"function": f"tests.effcli.batch.ray_jobs:{function}", "arguments": {"work": str(work)}}
    model, wanted = tiny_llama(), QuantizeParameters(scheme="auto", bits=5.0)
    context = PassContext(None, torch.device("cpu"), TEXT, work, spread=spread, opening=opening)
    return allocate(model, wanted, context, targets.find(model, wanted).layers)


@pytest.mark.thorough
def test_an_error_graph_is_that_of_one_process(cluster: Any, tmp_path: Path) -> None:
    alone = build(opened(2), SAMPLES, **ASKED, work=tmp_path / "alone")
    with on_ray(cluster, tmp_path) as spread:
        assert spread.room(0) == 2
        with pytest.raises(PassDoesNotFitError, match="the ray cluster has room for 0 of the pass's parts"):
            spread.room(10**15)
        found = build(opened(2), SAMPLES, **ASKED, work=tmp_path / "shared", spread=spread, opening=OPENING)
        assert len([*tmp_path.glob("parts-*/part-*/result.json")]) == 2
        assert found == alone
        nowhere = tmp_path / "not-shared"
        spread._results = nowhere
        with pytest.raises(PassError, match=f"does not see the folder '{nowhere}'.* that all nodes share"):
            spread.map("tests.effcli.batch.ray_jobs:where", [{}])
    assert not [*tmp_path.glob("parts-*")]


def test_what_a_job_ran_on_is_what_its_node_has(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    here = machine.local_device("auto")

    def run() -> list[str]:
        engine = RayEngine(cluster.address)
        prints = Fingerprints(device_class=engine.device_class)
        ran = driver.run(calls(2), str(tmp_path / "runs"), engine, fingerprints=prints)
        return [state.stage for state in ran.states]

    assert run() == ["passed"] * 2
    journal = [json.loads(line) for path in tmp_path.rglob("journal.jsonl") for line in path.open()]
    recorded = [line["fingerprint"]["job"]["device"] for line in journal if line.get("fingerprint")]
    assert recorded == [here] * 4
    assert run() == ["kept"] * 2
    with RayEngine(cluster.address) as engine:
        job = calls(1)[0]
        assert engine.device_class(replace(job, labels={"zone": "a"})) == here
        assert engine.device_class(replace(job, gpus=1.0)) == {"type": "cuda", "name": "not in this cluster"}


@pytest.mark.thorough
def test_a_checkpoint_is_that_of_one_process(cluster: Any, tmp_path: Path, tiny_folder: Path, effcli: Run) -> None:
    settings = ["--pass", "quantize:scheme=auto,bits=6,group_size=16,method=rtn", "--eval-tokens", 512, "-c", 32]
    for name, more in (("one", ()), ("two", ("--engine", "ray", "--address", cluster.address))):
        done = effcli("optimize", tiny_folder, *settings, "-o", name, *more, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        assert not folder_for(tmp_path / name).exists()
    one, two = (
        {path.name: sha256_of(path) for path in (tmp_path / name).glob("*.safetensors")} for name in ("one", "two")
    )
    assert one == two != {}


@pytest.mark.thorough
def test_a_part_whose_node_is_killed_is_done_again_elsewhere(cluster: Any, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    alone = allocation(tmp_path)
    (work / "hold").touch()
    measured: list[int] = []

    def kill() -> None:
        wait_for(lambda: len([*work.glob("sensitivity-part-*.json")]) == 2)
        measured.append(len([*work.glob("process-*")]))
        cluster.remove_node(cluster.killable["b"], allow_graceful=False)
        # A part may end before the node's death reaches it; this one is not to.
        wait_for(lambda: not all(is_alive(int(path.name.partition("-")[2])) for path in work.glob("process-*")))
        (work / "hold").unlink()

    with on_ray(cluster, tmp_path) as spread:
        thread = threading.Thread(target=kill)
        thread.start()
        found = allocation(work, spread, "held_llama")
        thread.join()
        logs = [path.read_text() for path in tmp_path.glob("parts-*/part-*.log")]
    assert measured == [2]
    assert sum("attempt 2" in log for log in logs) == 1
    assert (found.table, found.choices, found.notes) == (alone.table, alone.choices, alone.notes)
    assert not [*work.glob("sensitivity-part-*")]
