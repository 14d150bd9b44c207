import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pooch
import pytest

from jaxgpt import datafiles
from jaxgpt.config import BadInput

ROOT = Path(__file__).parents[1]
MIRROR = Path(os.environ.get("JAXGPT_DATA") or ROOT.parent / "shared" / "data")
CONTENT = b"x,y\n1,2\n"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No mirror, an empty cache, and a network that fails the test when it is asked."""

    def asked(*_):
        raise AssertionError("the network was asked")

    monkeypatch.delenv("JAXGPT_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", asked)


@pytest.fixture
def small(monkeypatch):
    """A known file of a few bytes."""
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    file = datafiles.DataFile("small.csv", "https://example.org/small.csv", sha256, "nobody", "none", "none")
    monkeypatch.setitem(datafiles._FILES, file.name, file)
    return file


def serve(monkeypatch, answer: bytes | Exception) -> list[str]:
    asked = []

    def download(_, url, output_file, *__):
        asked.append(url)
        if isinstance(answer, Exception):
            raise answer
        Path(output_file).write_bytes(answer)

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", download)
    return asked


def refusal(name: str) -> str:
    with pytest.raises(BadInput) as error:
        datafiles.fetch(name)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- the real files -----------------------------------------------------------------------------------------


@pytest.fixture
def mirror(monkeypatch):
    if not all((MIRROR / name).exists() for name in datafiles.names()):
        pytest.skip("no mirror of the real data files: JAXGPT_DATA names none and there is no ../shared/data")
    monkeypatch.setenv("JAXGPT_DATA", str(MIRROR))


@pytest.mark.usefixtures("mirror")
def test_real_chinchilla_points():
    with datafiles.fetch("svg_extracted_data.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 245
    assert sum(float(row["loss"]) < 3.44699 for row in rows) == 240
    assert all(float(row["Model Size"]) > 0 and float(row["Training FLOP"]) > 0 for row in rows)


@pytest.mark.usefixtures("mirror")
def test_real_bigg_table():
    table = json.loads(datafiles.fetch("bigg_audit_table.json").read_bytes())
    assert len(table["mc_tasks"]) == 89
    assert {len(task["acc_by_scale"]) for task in table["mc_tasks"]} == {12}


@pytest.mark.usefixtures("mirror")
def test_a_flipped_byte_in_a_real_file_is_refused(tmp_path, monkeypatch):
    for name in datafiles.names():
        data = bytearray((MIRROR / name).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / name).write_bytes(data)
    monkeypatch.setenv("JAXGPT_DATA", str(tmp_path))
    for name in datafiles.names():
        message = refusal(name)
        assert message.startswith(f"{tmp_path / name} has other bytes")
        assert datafiles.describe(name).sha256 in message
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() in message


def test_the_table_is_complete():
    assert datafiles.names() == ["svg_extracted_data.csv", "bigg_audit_table.json"]
    for file in map(datafiles.describe, datafiles.names()):
        assert file.url.startswith("https://raw.githubusercontent.com/")
        assert len(bytes.fromhex(file.sha256)) == 32
        assert all((file.source, file.licence, file.citation))


# --- mirror, cache, network ---------------------------------------------------------------------------------


def test_mirror_comes_first(tmp_path, monkeypatch, small):
    (tmp_path / small.name).write_bytes(CONTENT)
    monkeypatch.setenv("JAXGPT_DATA", str(tmp_path))
    assert datafiles.fetch(small.name) == tmp_path / small.name


@pytest.mark.parametrize("mirror", ["", "folder"])
def test_download_once_then_cache(tmp_path, monkeypatch, small, mirror):
    # Without a mirror, and with one that does not hold the file.
    (tmp_path / "folder").mkdir()
    (tmp_path / small.name).write_bytes(b"an empty JAXGPT_DATA is not the working folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXGPT_DATA", mirror and str(tmp_path / mirror))
    asked = serve(monkeypatch, CONTENT)
    path = datafiles.fetch(small.name)
    assert path == tmp_path / "cache" / "jaxgpt" / small.name
    assert path.read_bytes() == CONTENT
    assert datafiles.fetch(small.name) == path
    assert asked == [small.url]
    path.write_bytes(b"damaged")
    assert datafiles.fetch(small.name).read_bytes() == CONTENT
    assert len(asked) == 2


@pytest.mark.parametrize("answer", [ConnectionError("no name\nserver"), TimeoutError(), b"<html>404</html>"])
def test_no_network_or_other_bytes(tmp_path, monkeypatch, small, answer):
    serve(monkeypatch, answer)
    why = type(answer).__name__ if isinstance(answer, Exception) else "ValueError"
    assert refusal(small.name) == (
        f"small.csv could not be fetched from {small.url} ({why}); "
        f"JAXGPT_DATA can name a folder that holds it (sha256 {small.sha256})"
    )
    assert not list((tmp_path / "cache").rglob("*.csv"))


def test_pooch_is_imported_only_to_download():
    code = "import sys, jaxgpt.datafiles; sys.exit(not {'pooch', 'requests', 'jax'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- bad input ----------------------------------------------------------------------------------------------


def test_unknown_name():
    assert refusal("svg_extracted.csv") == (
        "'svg_extracted.csv' is not a known data file (did you mean svg_extracted_data.csv?); "
        "known: svg_extracted_data.csv, bigg_audit_table.json"
    )
    assert "did you mean" not in refusal("../../etc/passwd")


def test_mirror_that_is_no_folder(tmp_path, monkeypatch, small):
    (tmp_path / "file").write_bytes(b"")
    for wrong in ("file", "missing"):
        monkeypatch.setenv("JAXGPT_DATA", str(tmp_path / wrong))
        assert refusal(small.name) == (
            f"JAXGPT_DATA={tmp_path / wrong} is not a folder; it must hold data files or be unset"
        )


def test_a_mirrored_file_that_cannot_be_read(tmp_path, monkeypatch, small):
    (tmp_path / small.name).mkdir()
    monkeypatch.setenv("JAXGPT_DATA", str(tmp_path))
    assert refusal(small.name) == f"{tmp_path / small.name} cannot be read: Is a directory"
