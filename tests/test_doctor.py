"""What the doctor finds on a sound machine, and that it finds each illness."""

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from dittools import contract, doctor, system
from dittools.doctor import Check


def found(group: Callable[[], Any], name: str) -> Check:
    return next(check for check in group() if check.name == name)


def with_version(monkeypatch: pytest.MonkeyPatch, package: str, number: str | None) -> None:
    def pretended(name: str) -> str:
        if name != package:
            return version(name)
        if number is None:
            raise PackageNotFoundError(name)
        return number

    monkeypatch.setattr(doctor, "version", pretended)


@pytest.mark.parametrize(
    ("number", "state", "word"),
    [
        ("0.36.0", "ok", "0.36.0"),
        ("0.42.1+cpu", "ok", "0.42.1"),
        ("0.35.9", "broken", "0.36 or newer, tested up to 0.42"),
        ("0.36.0rc1", "ok", "rc1"),
        ("0.99.0", "ok", "newer than the tested 0.42"),
        ("1.0", "ok", "newer than the tested"),
        (None, "broken", "not installed"),
    ],
)
def test_versions_outside_the_supported_range_are_named(
    monkeypatch: pytest.MonkeyPatch, number: str | None, state: str, word: str
) -> None:
    with_version(monkeypatch, "diffusers", number)
    check = found(doctor._versions, "diffusers")
    assert check.state == state
    assert word in check.finding
    assert bool(check.remedy) == (state == "broken" or "newer than" in word)


def test_the_ranges_are_those_of_the_package() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for name, (least, _) in doctor.SUPPORTED.items():
        assert f'"{name}>={doctor._dotted(least)}"' in text
    first, last = map(doctor._dotted, doctor.PYTHON)
    assert f'requires-python = ">={first}"' in text
    for minor in range(doctor.PYTHON[0][1], doctor.PYTHON[1][1] + 1):
        assert f"Programming Language :: Python :: 3.{minor}" in text
    assert f"3.{doctor.PYTHON[1][1] + 1}" not in text
    assert last == "3.13"
    pins = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    for name, (_, tested) in doctor.SUPPORTED.items():
        if tested is not None:
            assert any(pin.startswith(f"{name}=={doctor._dotted(tested)}.") for pin in pins), name


def test_a_python_too_old_is_broken_and_a_newer_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for here, state, word in (((3, 9), "broken", ""), ((3, 14), "ok", "newer than the tested")):
        monkeypatch.setattr(sys, "version_info", (*here, 0))
        check = found(doctor._versions, "python")
        assert check.state == state
        assert word in check.finding


def test_another_system_is_said_to_be_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert found(doctor._versions, "system").state == "slow"


def test_every_name_the_patches_import_is_looked_up() -> None:
    symbols = contract.relied_on()
    names = {symbol.name for symbol in symbols}
    assert {"HookRegistry", "StateManager", "AttentionProcessorRegistry"} <= names
    assert {s.name: s.optional for s in symbols}["AttentionProcessorRegistry"]
    assert {s.name: s.optional for s in symbols}["HookRegistry"] is False
    assert not [s for s in contract.absent(symbols) if not s.optional]


def test_a_name_that_is_gone_breaks_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = contract.Symbol("diffusers.hooks", "NoSuchHook", "patches/steps.py", False)
    spare = contract.Symbol("diffusers.no_module", "Anything", "patches/seam.py", True)
    assert list(contract.absent((gone, spare))) == [gone, spare]
    monkeypatch.setattr(contract, "relied_on", lambda: (gone, spare))
    check = found(doctor._diffusers_contract, "diffusers contract")
    assert check.state == "broken"
    assert "diffusers.hooks.NoSuchHook (patches/steps.py)" in check.finding
    assert "no_module" not in check.finding
    assert "pip install" in check.remedy
    monkeypatch.setattr(contract, "relied_on", lambda: (spare,))
    check = found(doctor._diffusers_contract, "diffusers contract")
    assert check.state == "ok"
    assert "goes on without diffusers.no_module.Anything" in check.finding


def test_another_entry_point_breaks_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", lambda query, key: query)
    assert (
        "lacks value, attn_mask" in found(doctor._diffusers_contract, "diffusers contract").finding
    )
    monkeypatch.delattr(attention_dispatch, "dispatch_attention_fn")
    assert "is gone" in found(doctor._diffusers_contract, "diffusers contract").finding


def test_families_this_diffusers_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    names = [name for name in dir(diffusers) if not name.startswith("ZImage")]
    monkeypatch.setattr(type(diffusers), "__dir__", lambda self: names)
    there, there_not = contract.known_families()
    assert there_not == ["z_image"]
    assert "wan" in there
    assert "not in this diffusers: z_image" in found(doctor._diffusers_contract, "families").finding


def test_attaching_is_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(doctor._attach, "attach").state == "ok"
    stock = contract._latents
    calls = [0]

    def changing(pipe: Any) -> torch.Tensor:
        calls[0] += 1
        return stock(pipe) + (calls[0] == 2)

    monkeypatch.setattr(contract, "_latents", changing)
    check = found(doctor._attach, "attach")
    assert check.state == "broken"
    assert check.finding == "a dense plan changes the picture"


def test_the_triton_compiler_is_run_without_a_gpu() -> None:
    pytest.importorskip("triton")
    check = found(doctor._triton, "triton compiler")
    assert check.state == "ok"
    assert "registers" in check.finding


def test_folders_are_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DITTOOLS_CACHE", str(tmp_path / "not" / "yet"))
    assert {check.state for check in doctor._writable()} == {"ok"}
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("DITTOOLS_CACHE", str(tmp_path / "file" / "cache"))
    check = found(doctor._writable, "cache folder")
    assert check.state == "slow"
    assert "set DITTOOLS_CACHE to a folder you can write" in check.remedy


def test_settings_that_cost_time_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DITTOOLS_DEBUG", "TRITON_INTERPRET", "CUDA_LAUNCH_BLOCKING", "DITTOOLS_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    assert list(doctor._settings()) == []
    monkeypatch.setenv("DITTOOLS_DEBUG", "1")
    monkeypatch.setenv("DITTOOLS_NATIVE", "0")
    checks = list(doctor._settings())
    assert [check.name for check in checks] == ["DITTOOLS_DEBUG", "DITTOOLS_NATIVE"]
    assert {check.state for check in checks} == {"slow"}


def test_few_threads_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 64)
    check = found(doctor._devices, "cpu")
    assert check.state == "slow"
    assert "OMP_NUM_THREADS=32" in check.remedy


def test_a_check_that_dies_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies() -> Any:
        raise RuntimeError("two\nlines")

    for name in ("_backends", "_attach", "_diffusers_contract", "_triton", "_native", "_choice"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    monkeypatch.setattr(doctor, "_devices", dies)
    check = next(check for check in doctor.examine() if check.name == "devices")
    assert (check.state, check.finding) == ("broken", "RuntimeError: two lines")
    assert "dittools doctor --json" in check.remedy


def test_the_cache_folder_is_that_of_the_native_kernel() -> None:
    from dittools.kernels import native

    assert native.cache_dir().parent == system.cache_folder()
