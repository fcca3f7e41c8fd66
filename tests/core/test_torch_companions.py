"""torchvision and the like beside a torch that they don't fit: ``pytest tests/core/test_torch_companions.py``."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lfm2_plugin.cli import app
from lfm2_plugin.doctor import torch_companions, vllm_cpu

BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')"


@pytest.fixture
def companions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages beside which torch alone is to be found: torchvision is broken, torchaudio whole."""
    for name, code in (("torch", ""), ("torchvision", BROKEN), ("torchaudio", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
        version = "1.2.3+cpu" if name == "torch" else "1.2.3"
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Version: {version}\n\n"
        )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    known = torch_companions.NAMES
    monkeypatch.setattr(torch_companions, "NAMES", tuple(n for n in known if n != "torchcodec"))
    return tmp_path


def has_sglang(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch_companions, "_sglang", lambda: there)


def test_a_companion_that_fails_at_import_is_a_fault(
    companions: Path, monkeypatch: pytest.MonkeyPatch
):
    has_sglang(monkeypatch, False)
    (finding,) = torch_companions.companion_findings()
    assert (finding.name, finding.status) == ("torchvision", "fault")
    assert "fails at import beside torch 1.2.3+cpu: RuntimeError: operator" in finding.text
    assert "pip uninstall torchvision, which lfm2 doctor --fix does" in finding.remedy


@pytest.mark.parametrize(("torch", "status"), [("1.2.3+cpu", "note"), ("1.2.3", "fault")])
def test_sglang_keeps_its_companions(
    companions: Path, monkeypatch: pytest.MonkeyPatch, torch: str, status: str
):
    has_sglang(monkeypatch, True)
    (companions / "torch-1.2.3+cpu.dist-info" / "METADATA").write_text(f"Version: {torch}\n\n")
    (finding,) = torch_companions.companion_findings()
    assert (finding.name, finding.status) == ("torchvision", status)
    assert torch_companions.fix() == []


def test_fix_uninstalls_a_broken_companion_and_no_other(
    companions: Path, monkeypatch: pytest.MonkeyPatch
):
    has_sglang(monkeypatch, False)
    uninstaller = [sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"]
    monkeypatch.setattr(
        torch_companions, "_uninstaller", lambda: [*uninstaller, str(companions / "called")]
    )
    assert torch_companions.fix() == ["torchvision"]
    assert (companions / "called").read_text() == "torchvision"


def test_fix_says_why_it_could_not_uninstall(companions: Path, monkeypatch: pytest.MonkeyPatch):
    has_sglang(monkeypatch, False)
    failing = [sys.executable, "-c", "import sys; sys.exit('it is not yours')"]
    monkeypatch.setattr(torch_companions, "_uninstaller", lambda: failing)
    monkeypatch.setattr(vllm_cpu, "fix", lambda: None)
    result = CliRunner().invoke(app, ["doctor", "--fix"])
    assert result.exit_code == 1
    assert result.output == "lfm2 doctor --fix: can't uninstall torchvision: it is not yours\n"


def test_without_pip_uv_uninstalls_and_without_both_the_error_says_so(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch_companions.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch_companions.shutil, "which", lambda name: "/x/uv")
    assert torch_companions._uninstaller() == [
        *("/x/uv", "pip", "uninstall", "--python", sys.executable)
    ]
    monkeypatch.setattr(torch_companions.shutil, "which", lambda name: None)
    with pytest.raises(torch_companions.UninstallFailed, match="neither pip nor uv"):
        torch_companions._uninstaller()
