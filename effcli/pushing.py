"""``effcli push``: a verified checkpoint to the Hugging Face hub, every file in one commit.

Nothing is sent unless that is asked for: without ``upload``, the plan is all there is, and no connection is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from effcli import signature
from effcli.errors import BadInputError
from effcli.hub import network_errors
from effcli.verifying import verify

if TYPE_CHECKING:
    from profilers.base import Progress


@dataclass(frozen=True)
class Push:
    """What goes where.

    Attributes
    ----------
    folder, repository : str
    revision : str
        Branch.
    private : bool
        What a repository that is not there yet is made as; one that is there stays as it is.
    files : tuple of (str, int)
        Name and bytes, in order of name.
    signature : str
        sha256 of ``SHA256SUMS``.
    url : str or None
        Of the commit; None where nothing was sent.
    """

    folder: str
    repository: str
    revision: str
    private: bool
    files: tuple[tuple[str, int], ...]
    signature: str
    url: str | None = None

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(size for _, size in self.files)


def push(
    folder: Path | str,
    repository: str,
    *,
    upload: bool = False,
    private: bool = True,
    revision: str = "main",
    message: str | None = None,
    progress: Progress | None = None,
) -> Push:
    """Verify a checkpoint, and upload it if asked to.

    Parameters
    ----------
    folder : Path or str
        That ``effcli optimize`` or ``effcli export`` wrote.
    repository : str
        ``ORG/NAME``.
    upload : bool
        Send it; else only say what would go.
    private : bool
        Of a repository that is made for it.
    revision : str
        Branch; it is made where it is not there.
    message : str, optional
        Of the commit.
    progress : Progress, optional

    Raises
    ------
    BadInputError
        For a name that the hub does not take, no token, a refusal of the hub, or no connection.
    SourceError
        If the checkpoint is not what its report says.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise BadInputError(f"'{repository}' is no name of a hub repository ({error}); write ORG/NAME") from None
    if "/" not in repository:
        raise BadInputError(f"'{repository}' names no owner; write ORG/NAME")
    folder = Path(folder)
    found = verify(folder)
    paths = sorted([*signature.files_of(folder), folder / signature.FILE])
    planned = Push(
        folder=str(folder),
        repository=repository,
        revision=revision,
        private=private,
        files=tuple((path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths),
        signature=found.signature,
    )
    if not upload:
        return planned
    url = _upload(planned, message or f"effcli checkpoint {found.signature[:12]}", progress)
    return Push(**{**planned.__dict__, "url": url})


def _upload(planned: Push, message: str, progress: Progress | None) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    from effcli.quiet import quiet_transformers

    if get_token() is None:
        raise BadInputError("no token for the hub; log in first: hf auth login (or set HF_TOKEN)")
    api = HfApi()
    broken: tuple[type[Exception], ...] = (OfflineModeIsEnabled, *network_errors())
    try:
        with quiet_transformers(progress):
            api.create_repo(planned.repository, private=planned.private, exist_ok=True)
            if planned.revision != "main":
                api.create_branch(planned.repository, branch=planned.revision, exist_ok=True)
            # Named one by one: what is sent is what was verified and shown, whatever else comes into the folder.
            commit = api.create_commit(
                planned.repository,
                [CommitOperationAdd(name, Path(planned.folder) / name) for name, _ in planned.files],
                commit_message=message,
                revision=planned.revision,
            )
    except HfHubHTTPError as error:
        first = str(error).strip().splitlines()[0]
        raise BadInputError(
            f"the hub refused '{planned.repository}': {first}; check the name and that your token may write there"
        ) from None
    except broken as error:
        raise BadInputError(
            f"cannot reach the hub for '{planned.repository}' ({type(error).__name__}); check the connection, or unset "
            "HF_HUB_OFFLINE; nothing was published"
        ) from None
    return str(commit.commit_url)
