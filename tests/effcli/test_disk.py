import errno
import shutil

import pytest

from effcli.disk import disk_errors, free_bytes, nearest_existing, new_file_mode, used_bytes
from effcli.errors import NoRoomError, SourceError


def test_folder_that_does_not_exist_yet(tmp_path):
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_used(tmp_path):
    assert used_bytes(tmp_path / "none") == 0
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(bytes(100))
    (tmp_path / "y").write_bytes(bytes(23))
    assert used_bytes(tmp_path) == 123


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, NoRoomError), (errno.EACCES, SourceError), (errno.EIO, OSError)]
)
def test_errors(tmp_path, code, kind):
    with pytest.raises(kind), disk_errors(tmp_path, 1000):
        raise OSError(code, "words")


def test_new_files_get_what_the_umask_allows(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert plain.stat().st_mode & 0o777 == new_file_mode()
