"""Real data files by name and sha256: from a local mirror folder (JAXGPT_DATA), else from their publisher.

The project holds no copies. `fetch` never returns a file whose bytes differ from those named here.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from jaxgpt.config import BadInput


@dataclass(frozen=True)
class DataFile:
    """A published file. sha256: 64 hex digits of its bytes. source: who published it and what it holds."""

    name: str
    url: str
    sha256: str
    source: str
    licence: str
    citation: str


_FILES = {
    file.name: file
    for file in (
        DataFile(
            name="svg_extracted_data.csv",
            url="https://raw.githubusercontent.com/epoch-research/analyzing-chinchilla/main/data/"
            "svg_extracted_data.csv",
            sha256="193478df4e90f040016431996c45682659306840ecdadf83cfb9cd5ca0aa1b30",
            source="epoch-research/analyzing-chinchilla: 245 (model size, training FLOP, loss) points read off "
            "Figure 4 of Hoffmann et al. 2022",
            licence="none stated",
            citation="Besiroglu et al. 2024, Chinchilla Scaling: A replication attempt, arXiv:2404.10102",
        ),
        DataFile(
            name="bigg_audit_table.json",
            # Pinned: the repository is worked on, and the published name differs from ours.
            url="https://raw.githubusercontent.com/PeterPonyu/calibration-traps/"
            "9adfe441cd507063550bf595aa8aad6473af1b2e/experiments/results/bigbench_audit/audit_table.json",
            sha256="89cbd8bb8c891515060f0e3818cb262b3983e8e807f16c96bc7705d670366492",
            source="PeterPonyu/calibration-traps: accuracy of 12 BIG-G model sizes on 89 BIG-bench "
            "multiple-choice tasks, derived from google/BIG-bench (Apache-2.0)",
            licence="CC BY 4.0",
            citation="Srivastava et al. 2022, Beyond the Imitation Game, arXiv:2206.04615",
        ),
    )
}


def names() -> list[str]:
    """The names that `fetch` knows."""
    return list(_FILES)


def describe(name: str) -> DataFile:
    """Address, sha256, source, licence and citation of a file. Raises BadInput for an unknown name."""
    if name not in _FILES:
        near = difflib.get_close_matches(name, _FILES, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise BadInput(f"{name!r} is not a known data file{hint}; known: {', '.join(_FILES)}")
    return _FILES[name]


def fetch(name: str) -> Path:
    """A local path whose bytes have the file's sha256: in the folder JAXGPT_DATA, else downloaded and cached.

    Raises BadInput for an unknown name, a JAXGPT_DATA that is no folder, a mirrored file with other bytes,
    and when the file cannot be downloaded.
    """
    file = describe(name)
    mirror = os.environ.get("JAXGPT_DATA")
    if mirror:
        if not Path(mirror).is_dir():
            raise BadInput(f"JAXGPT_DATA={mirror} is not a folder; it must hold data files or be unset")
        path = Path(mirror) / name
        if path.exists():
            found = _sha256(path)
            if found != file.sha256:
                raise BadInput(
                    f"{path} has other bytes than the published file: sha256 {file.sha256} expected, {found} found"
                )
            return path
    import pooch  # imports requests; most commands fetch nothing

    try:
        cached = pooch.retrieve(file.url, f"sha256:{file.sha256}", name, pooch.os_cache("jaxgpt"))
    except (OSError, ValueError) as error:  # no network, HTTP error, full disk; ValueError: other bytes came
        raise BadInput(
            f"{name} could not be fetched from {file.url} ({type(error).__name__}); "
            f"JAXGPT_DATA can name a folder that holds it (sha256 {file.sha256})"
        ) from error
    return Path(cached)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
