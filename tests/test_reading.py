"""Files from elsewhere: bounded, plain values, or one of two errors; and where systems differ."""

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from dittools import reading, system

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("dittools/**/*.py"), *ROOT.glob("bench/*.py"), ROOT / "app.py"])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("NaN", "NaN is no number"),
        ("[-Infinity]", "no number"),
        ("1e999", "too large"),
        ("[9223372036854775808]", "64 bits"),
        ("-" + "9" * 5000, "64 bits"),
        ("[" * 33 + "]" * 33, "32 levels"),
        ("[" * 100_000, "32 levels"),
        ('{"a":' * 40 + "1" + "}" * 40, "32 levels"),
        (r'"\ud800"', "surrogates"),
        (r'{"\uDC00": 1}', "surrogates"),
        ("", "Expecting value"),
        ("{", "Expecting"),
    ],
)
def test_json_that_could_surprise_is_refused(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        reading.parse_json(text)


def test_plain_json_comes_back_as_it_is() -> None:
    content = {"a": [1, -2.5, 9_223_372_036_854_775_807, True, None], "b": "\U0001f600 \\ud800"}
    assert reading.parse_json(json.dumps(content)) == content  # a pair of halves is a character
    assert reading.parse_json(b"\xef\xbb\xbf[1e308]") == [1e308]
    assert reading.parse_json("[" * 32 + "]" * 32)


def test_devices_pipes_folders_and_large_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait forever
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link", "."):
        with pytest.raises(ValueError, match="no ordinary file"):
            reading.read_bytes(tmp_path / name)
    (tmp_path / "large").write_bytes(b" " * 11)
    with pytest.raises(ValueError, match="11 bytes, more than 10"):
        reading.read_json(tmp_path / "large", most=10)
    with pytest.raises(OSError, match="none"):
        reading.read_text(tmp_path / "none")


def test_tensors_come_back_with_their_notes(tmp_path: Path) -> None:
    blob = save({"a": torch.arange(3), "b": torch.zeros(0, 4)}, {"by": "test"})
    (tmp_path / "t.safetensors").write_bytes(blob)
    for source in (blob, tmp_path / "t.safetensors"):
        tensors, notes = reading.read_tensors(source)
        assert tensors["a"].tolist() == [0, 1, 2]
        assert tensors["b"].shape == (0, 4)
        assert notes == {"by": "test"}


def described(header: dict[str, Any] | bytes, body: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\xff" * 8,
        b"\xff" * 40,
        described(b"[]"),
        described(b"null"),
        described(b"{" * 50),
        described({"a": {"dtype": "F32", "shape": [1_000_000_000], "data_offsets": [0, 8]}}),
        described({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4_000_000_000]}}),
        described({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        described({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}),
        described({"a": {"dtype": "none", "shape": [2], "data_offsets": [0, 8]}}),
        described({"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}),
        described({"a": {"dtype": "F32", "shape": [0, 10**18, 99], "data_offsets": [0, 0]}}, b""),
    ],
)
def test_damaged_tensors_are_refused_before_memory_is_taken(blob: bytes) -> None:
    with pytest.raises(ValueError, match=r"damaged|holds no tensors|levels|property name"):
        reading.read_tensors(blob)


@pytest.mark.parametrize(
    "name",
    ["../up", "/etc/passwd", "a/b", "a\\b", "C:x", "", ".", "..", "a\0b", "a\nb", "x" * 300, 3],
)
def test_only_plain_names_stay_in_the_folder(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ValueError, match="no plain file name"):
        reading.beside(tmp_path / "plan.json", name)


def test_links_are_followed_inside_the_folder_only(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("x")
    (inside / "real").write_text("x")
    (inside / "in").symlink_to("real")
    (inside / "out").symlink_to(outside / "secret")
    (inside / "loop").symlink_to("loop")
    plan = inside / "plan.json"
    assert reading.beside(plan, "in").read_text() == "x"
    for name in ("out", "loop"):
        with pytest.raises(ValueError, match=r"another folder|cannot be followed"):
            reading.beside(plan, name)
    (outside / "plan").write_text("{}")  # as a hub keeps files: both are links into one folder
    plan.symlink_to(outside / "plan")
    assert reading.beside(plan, "out").read_text() == "x"


@pytest.mark.parametrize(
    ("value", "shape", "want"),
    [
        (1, float, ""),
        (True, float, "it is no float"),
        (True, int, "it is no int"),
        (True, bool, ""),
        (None, (str, None), ""),
        (3, (str, None), "it is no str"),
        ({"a": [1, "x"]}, {"a": [int]}, "it.a[1] is no int"),
        ({}, {"a": int}, "it lacks a"),
        ({}, {"a?": int}, ""),
        ({"a": ""}, {"a?": int}, "it.a is no int"),
        ({"k": {"m": "x"}}, {"*": {"m": float}}, "it.k.m is no float"),
        ([], {"a": int}, "it is no object"),
        ({}, [int], "it is no list"),
    ],
)
def test_shapes_name_the_first_value_that_does_not_fit(value: Any, shape: Any, want: str) -> None:
    assert reading.misfit(value, shape) == want


def calls_of(path: Path) -> set[str]:
    """Names of the functions a file calls and the modules it imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call):
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            safe = keywords.get("weights_only") == "True" or keywords.get("allow_pickle") == "False"
            found |= set() if safe else {ast.unparse(node.func)}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_or_run(path: Path) -> None:
    modules = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    calls = {"torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system", "compile"}
    assert not calls_of(path) & (modules | calls)
    assert not re.search(r"allow_pickle\s*=\s*True|shell\s*=\s*True", path.read_text())


SHIPPED = [p for p in SOURCES if p.parent.name != "bench" and p.name != "system.py"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_systems_differ_in_one_file_only(path: Path) -> None:
    modules = {"fcntl", "resource", "pwd", "grp", "termios", "msvcrt", "winreg", "signal", "posix"}
    assert not calls_of(path) & modules
    text = path.read_text()
    for pattern in (
        r"\bos\.(name|kill|killpg|fork|uname|sched_\w+|geteuid|getuid|nice|mkfifo|getloadavg)\b",
        r"[\"']/(proc|sys|dev|etc|tmp|var)\b",
        r"\bsys\.platform\b",
        r"\.symlink_to\(|os\.(sym)?link\(",
    ):
        assert not re.search(pattern, text), pattern


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_3_10_has_what_it_uses(path: Path) -> None:
    """Grammar, and the library's newer names; mypy looks at the package for 3.10 as well."""
    ast.parse(path.read_text(), feature_version=(3, 10))
    later = {"tomllib", "typing.Self", "typing.assert_never", "typing.override", "datetime.UTC",
             "enum.StrEnum", "itertools.batched", "contextlib.chdir", "asyncio.Runner"}  # fmt: skip
    assert not calls_of(path) & later


def test_without_linux_files_the_answers_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Path, *_: Any, **__: Any) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(Path, "write_text", absent)
    assert system.processor() == ""
    assert system.cpu_features() == set()
    assert not system.reset_peak_memory()
    assert system.peak_memory() is None
    assert system.container_memory() == (None, None)


def test_links_become_copies_where_they_are_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError("a privilege is not held")

    (tmp_path / "a").write_text("x")
    monkeypatch.setattr(Path, "symlink_to", refused)
    system.link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "x"


def test_the_cache_folder_follows_its_two_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("DITTOOLS_CACHE", raising=False)
    assert system.cache_folder() == Path("/x/dittools")
    monkeypatch.setenv("DITTOOLS_CACHE", "/own")
    assert system.cache_folder() == Path("/own")
    monkeypatch.delenv("DITTOOLS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert system.cache_folder() == Path.home() / ".cache" / "dittools"
