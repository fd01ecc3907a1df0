"""Staged work: what survives a crash, what is refused, and that the target is never half there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from effcli import provenance, staging
from effcli.checkpoint_files import sha256_of
from effcli.errors import BadInputError, NoRoomError, SourceError
from effcli.staging import changed, check_target, folder_for, link_or_copy, open_staging, published_earlier

WORK = {"source": {"model.safetensors": "aa"}, "recipe": {"seed": 0}, "options": {"dtype": "auto"}}


def open_(target: Path, *, resume: bool = False, force: bool = False, work=WORK):
    return open_staging(target, work, resume=resume, force=force)


def write_stage(staging, name: str, text: str = "weights") -> None:
    (staging.begin(name) / "file.txt").write_text(text)
    staging.finish(name, {"said": text})


def put_out(staging, text: str) -> None:
    out = staging.begin("out")
    (out / "config.json").write_text("{}")
    (out / "effcli.json").write_text(text)


def test_a_finished_stage_is_found_again(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with open_(target) as staging:
        write_stage(staging, "before")
        (staging.begin("pass-1") / "half.txt").write_text("not finished")
    with open_(target, resume=True) as staging:
        assert staging.finished("before") == {"said": "weights"}
        assert staging.finished("pass-1") is None
        assert list(staging.begin("pass-1").iterdir()) == []


def test_resume_with_nothing_staged_starts(tmp_path: Path) -> None:
    with open_(tmp_path / "out", resume=True) as staging:
        assert staging.finished("before") is None


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_(tmp_path / "out") as staging:
        staging.begin("before")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_unfinished_work_is_named_with_both_ways_on(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with open_(target) as staging:
        write_stage(staging, "before")
    with pytest.raises(BadInputError, match=r"finished: before\); add --resume .* or --force"), open_(target):
        pass
    with open_(target, resume=True) as staging:  # a refusal takes nothing away
        assert staging.finished("before") is not None
    with open_(target, force=True) as staging:
        assert staging.finished("before") is None


def test_the_passs_own_work_counts_as_unfinished_and_survives(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with open_(target) as staging:
        (staging.work("pass-1") / "layer-0").write_text("done")
    with pytest.raises(BadInputError, match="add --resume"), open_(target):
        pass
    with open_(target, resume=True) as staging:
        staging.begin("pass-1")
        assert (staging.work("pass-1") / "layer-0").read_text() == "done"


@pytest.mark.parametrize(
    ("part", "now", "words"),
    [
        ("source", {"model.safetensors": "bb"}, "source file 'model.safetensors' changed"),
        ("recipe", {"seed": 1}, "recipe 'seed' was 0, is 1"),
        ("options", {"dtype": "bf16"}, "option 'dtype' was 'auto', is 'bf16'"),
        ("versions", {"torch": "3"}, "version of 'torch' was None, is '3'"),
    ],
)
def test_work_of_another_fingerprint_is_not_resumed(tmp_path: Path, part: str, now: dict, words: str) -> None:
    with open_(tmp_path / "out") as staging:
        write_stage(staging, "before")
    with (
        pytest.raises(BadInputError, match=f"cannot resume .*: {words}"),
        open_(tmp_path / "out", resume=True, work={**WORK, part: now}),
    ):
        pass
    with open_(tmp_path / "out", resume=True) as staging:
        assert staging.finished("before") is not None


def test_nothing_changed_says_nothing() -> None:
    assert changed(WORK, json.loads(json.dumps(WORK))) == ""


def test_a_damaged_staged_file_is_named_with_the_way_on(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with open_(target) as staging:
        write_stage(staging, "before")
        write_stage(staging, "pass-1")
        write_stage(staging, "after")
    damaged = folder_for(target) / "pass-1" / "file.txt"
    damaged.write_text("weightz")
    with pytest.raises(SourceError, match=r"pass-1/file.txt' is damaged .* remove the folder .*pass-1'"):  # noqa: SIM117
        with open_(target, resume=True):
            pass
    damaged.unlink()
    with pytest.raises(SourceError, match="is missing"), open_(target, resume=True):
        pass
    damaged.parent.rmdir()  # as the message says
    with open_(target, resume=True) as staging:
        assert staging.finished("before") is not None
        assert staging.finished("pass-1") is None
        assert staging.finished("after") is None


def test_a_state_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with open_(tmp_path / "out") as staging:
        write_stage(staging, "before")
    (folder_for(tmp_path / "out") / "state.json").write_text("{")
    with pytest.raises(SourceError, match="state.json' cannot be read"), open_(tmp_path / "out", resume=True):
        pass
    assert (folder_for(tmp_path / "out") / "before" / "file.txt").is_file()


def test_two_runs_do_not_share_a_stage(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from effcli.staging import open_staging\n"
        "with open_staging(Path(sys.argv[1]), {}, resume=False, force=True) as staging:\n"
        "    staging.work('pass-1').joinpath('x').touch(); print('open', flush=True); sys.stdin.read()"
    )
    target = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(BadInputError, match="another run is working on"), open_(target, force=True):
            pass
        other.send_signal(signal.SIGKILL)
    with open_(target, force=True):  # the lock of a killed run is free
        pass


def test_the_checkpoint_appears_whole_and_the_staging_goes(tmp_path: Path) -> None:
    with open_(tmp_path / "out") as staging:
        put_out(staging, "new")
        staging.publish(force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out" / "effcli.json").read_text() == "new"


def existing(tmp_path: Path) -> Path:
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / "effcli.json").write_text("old")
    return target


def test_force_replaces_at_the_very_end(tmp_path: Path) -> None:
    target = existing(tmp_path)
    with open_(target, force=True) as staging:
        put_out(staging, "new")
        assert (target / "effcli.json").read_text() == "old"
        staging.publish(force=True)
    assert (target / "effcli.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_target_that_came_into_being_meanwhile_is_kept(tmp_path: Path) -> None:
    with open_(tmp_path / "out") as staging:
        write_stage(staging, "after")
        put_out(staging, "new")
        target = existing(tmp_path)
        with pytest.raises(BadInputError, match="came into being meanwhile"):
            staging.publish(force=False)
    assert (target / "effcli.json").read_text() == "old"


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_crash_between_the_renames_loses_nothing(tmp_path: Path, renames: int) -> None:
    """Kill a process right before its nth rename of the swap; both checkpoints are whole somewhere, and it goes on."""
    target = existing(tmp_path)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom effcli.staging import open_staging\n"
        "rename, left = Path.rename, [int(sys.argv[2])]\n"
        "def counted(self, other):\n"
        "    if self.is_dir():\n"
        "        if left[0] == 0: os.kill(os.getpid(), 9)\n"
        "        left[0] -= 1\n"
        "    return rename(self, other)\n"
        "Path.rename = counted\n"
        "import shutil; tree = shutil.rmtree\n"
        "def removed(path, *a, **k):\n"
        "    if left[0] == 0 and int(sys.argv[2]) == 2: os.kill(os.getpid(), 9)\n"
        "    return tree(path, *a, **k)\n"
        "shutil.rmtree = removed\n"
        "with open_staging(Path(sys.argv[1]), {}, resume=False, force=True) as staging:\n"
        "    folder = staging.begin('after'); (folder / 'f').touch(); staging.finish('after', {})\n"
        "    out = staging.begin('out'); (out / 'config.json').write_text('{}')\n"
        "    (out / 'effcli.json').write_text('new'); staging.publish(force=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target), str(renames)])
    assert done.returncode == -signal.SIGKILL
    if renames == 2:  # published, only the cleaning up is left; its state went first, so the rest counts as nothing
        assert (target / "effcli.json").read_text() == "new"
        assert not published_earlier(target)
    with open_(target, resume=True, work={}) as staging:
        assert (target / "effcli.json").read_text() == ("new" if renames == 2 else "old")
        put_out(staging, "newer")
        staging.publish(force=True)
    assert (target / "effcli.json").read_text() == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_published_checkpoint_is_recognized(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with open_(target) as staging:
        write_stage(staging, "after")
        put_out(staging, "new")
        staging.remove = lambda: None
        staging.publish(force=False)
    assert published_earlier(target)
    (target / "effcli.json").write_text("another")
    assert not published_earlier(target)


def test_a_target_inside_the_source_or_around_it_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    link = tmp_path / "link"
    link.symlink_to(source)
    for target in (source, source / "out", link / "deep" / "out"):
        with pytest.raises(BadInputError, match=r"is inside the source|is not a folder|exists"):
            check_target(target, source, force=True)
    with pytest.raises(BadInputError, match="is inside the output"):
        check_target(tmp_path, source, force=True)
    check_target(tmp_path / "out", source, force=False)


def test_force_replaces_checkpoints_only(tmp_path: Path) -> None:
    target = tmp_path / "documents"
    target.mkdir()
    check_target(target, None, force=False)  # an empty folder holds nothing to lose
    (target / "letter.txt").write_text("dear")
    with pytest.raises(BadInputError, match="exists; add --force"):
        check_target(target, None, force=False)
    with pytest.raises(BadInputError, match="is no checkpoint"):
        check_target(target, None, force=True)
    with pytest.raises(BadInputError, match="is not a folder"):
        check_target(target / "letter.txt", None, force=True)
    with pytest.raises(BadInputError, match=r"letter.txt' is a file"):
        check_target(target / "letter.txt" / "out", None, force=True)


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """Mount a small tmpfs; skips where that is not allowed."""
    folder.mkdir(exist_ok=True)
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_with_the_way_on(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=64k") as small:
        with pytest.raises(NoRoomError, match=r"is full; what was finished is kept .* --resume"):  # noqa: SIM117
            with open_(small / "out") as staging:
                write_stage(staging, "before")
                (staging.begin("pass-1") / "big").write_bytes(bytes(200_000))
        with open_(small / "out", resume=True) as staging:
            assert staging.finished("before") is not None
        assert not (small / "out").exists()


def test_safetensors_on_a_full_disk_is_no_bug(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with mounted(tmp_path / "small", "size=64k") as small, pytest.raises(NoRoomError, match="is full"):  # noqa: SIM117
        with open_(small / "out") as staging:
            save_file({"a": torch.zeros(100_000)}, staging.begin("pass-1") / "model.safetensors")


def test_a_read_only_place_is_refused_before_anything(tmp_path: Path) -> None:
    with (
        mounted(tmp_path / "closed", "ro,size=64k") as closed,
        pytest.raises(BadInputError, match="cannot be written"),
    ):
        check_target(closed / "out", None, force=False)


def test_link_or_copy_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    link_or_copy(tmp_path / "a", tmp_path / "inner" / "b")
    assert (tmp_path / "inner" / "b").read_bytes() == b"weights"


@pytest.mark.parametrize("left", ["lock alone", "no stage", "published", "a stage", "held"])
def test_what_is_left_of_published_work_is_removed_and_no_other(tmp_path: Path, left: str) -> None:
    """A kill between the rename and the end of cleaning up leaves any part of the folder."""
    target = tmp_path / "out"
    with open_staging(target, {}, resume=False, force=False) as staged:
        (staged.begin("out") / provenance.FILE).write_text("{}")
        stages = {"pass-1": {"result": {}, "files": {}}} if left in ("published", "a stage", "held") else {}
        staged._state["stages"] = stages
        if left == "published":
            staged._state["published"] = sha256_of(staged.out / provenance.FILE)
        staged._write()
        staged.out.rename(target)
        if left == "lock alone":
            (staged.folder / "state.json").unlink()
        copy = shutil.copytree(staged.folder, tmp_path / "copy")
        if left == "held":
            staging.drop_published(target)
            assert staged.folder.exists()
    shutil.rmtree(staged.folder, ignore_errors=True)
    copy.rename(staged.folder)
    staging.drop_published(target)
    assert staged.folder.exists() == (left in ("a stage", "held"))
    assert (target / provenance.FILE).is_file()
