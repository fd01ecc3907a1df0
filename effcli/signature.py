"""``SHA256SUMS``: the sha256 of every file of a checkpoint, its report included, in the form of ``sha256sum``.

Anyone can check it without effcli: ``cd out && sha256sum -c SHA256SUMS``. The sha256 of the file itself stands for the
whole folder: who knows that one number from elsewhere knows that nothing was changed, not even the sums.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from effcli.checkpoint_files import sha256_each, sha256_of
from effcli.errors import SourceError

FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_HUB = ".cache"
"""Where huggingface_hub keeps its notes in a folder that it downloaded to."""


def files_of(folder: Path) -> list[Path]:
    """Return the files that the sums cover: all but the sums, and git's and the hub's own."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        own = parts == (FILE,) or parts[0] in (".git", _HUB) or parts[-1] in (".gitattributes",)
        if path.is_file() and not own:
            found.append(path)
    return found


def write(folder: Path, known: Mapping[str, str] | None = None) -> str:
    """Write the sums of a folder and return the sha256 that stands for them.

    Parameters
    ----------
    folder : Path
    known : mapping of str to str, optional
        sha256 of files that need not be read again, by name relative to the folder.
    """
    names = {path.relative_to(folder).as_posix(): path for path in files_of(folder)}
    digests = {name: value for name, value in (known or {}).items() if name in names}
    fresh = sha256_each(path for name, path in names.items() if name not in digests)
    digests |= {path.relative_to(folder).as_posix(): value for path, value in fresh.items()}
    text = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    (folder / FILE).write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def read(folder: Path) -> dict[str, str]:
    """Return the sha256 that the sums hold, by name.

    Raises
    ------
    SourceError
        If there are none, or a line is not of that form or leads out of the folder.
    """
    path = folder / FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise SourceError(
            f"'{folder}' has no {FILE}: it was not signed; make the checkpoint again to have it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read '{path}' ({error}); fetch the checkpoint again") from None
    sums = {}
    for number, line in enumerate(lines, start=1):
        found = _LINE.fullmatch(line)
        if found is None or Path(found[2]).is_absolute() or ".." in Path(found[2]).parts:
            raise SourceError(f"'{path}', line {number} is no sha256 and name; fetch the checkpoint again")
        sums[found[2]] = found[1]
    return sums


def check(folder: Path) -> tuple[int, str]:
    """Compare every file with its sum.

    Returns
    -------
    count : int
        Files that were compared.
    signature : str
        sha256 of the sums themselves.

    Raises
    ------
    SourceError
        Naming a file that is missing, changed, or not in the sums.
    """
    sums = read(folder)
    there = {path.relative_to(folder).as_posix(): path for path in files_of(folder)}
    for name in sums:
        if name not in there:
            raise SourceError(f"'{folder}' lacks '{name}', which its {FILE} lists; fetch the checkpoint again")
    for name in there:
        if name not in sums:
            raise SourceError(f"'{folder / name}' is not in {FILE}: it was added later; remove it, or do not trust it")
    for path, found in sha256_each(there.values()).items():
        expected = sums[path.relative_to(folder).as_posix()]
        if found != expected:
            raise SourceError(
                f"'{path}' has sha256 {found[:12]}… and {FILE} says {expected[:12]}…: it was damaged or changed; fetch "
                "the checkpoint again"
            )
    return len(sums), sha256_of(folder / FILE)
