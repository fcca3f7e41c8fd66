"""The house rules, kept by reading every file: ``pytest tests/core/test_layering.py``.

The second half feeds the scanner snippets that break a rule, so that it can't go blind unnoticed.
"""

from pathlib import Path

import pytest

from tests.core.house_rules import FILE_LINES, FUNCTION_LINES, violations

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lfm2_plugin", "vllm_model", "sglang_model")
OTHERS = ("tests", "benchmarks", "examples", "tools")


def python_files(*folders: str) -> list[str]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


@pytest.mark.parametrize("path", python_files(*PACKAGES, *OTHERS))
def test_the_file_keeps_the_rules(path: str):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_the_scan_sees_the_packages():
    files = python_files(*PACKAGES)
    for expected in (
        "lfm2_plugin/register.py",
        "vllm_model/engine_api.py",
        "sglang_model/__init__.py",
    ):
        assert expected in files


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
LONG_DOCSTRING = 'def f():\n    """One.\n' + "    two\n" * 80 + '    """\n    return 1\n'
BROKEN = {
    "core imports vllm": ("lfm2_plugin/a.py", "import vllm.config"),
    "core imports sglang late": ("lfm2_plugin/a.py", "def f():\n    from sglang.srt import x"),
    "core imports a front": ("lfm2_plugin/ops/a.py", "from vllm_model.model import M"),
    "core imports by string": (
        "lfm2_plugin/a.py",
        "import importlib\nimportlib.import_module('vllm')",
    ),
    "door imports vllm early": ("lfm2_plugin/register.py", "import vllm"),
    "door imports torch": ("lfm2_plugin/register.py", "import torch"),
    "package imports torch": ("lfm2_plugin/__init__.py", "from torch import nn"),
    "front's init imports torch": (
        "vllm_model/__init__.py",
        "try:\n    import torch\nexcept E: pass",
    ),
    "vllm outside the room": ("vllm_model/model.py", "from vllm.config import VllmConfig"),
    "vllm outside the room, late": ("vllm_model/model.py", "def f():\n    import vllm"),
    "front imports the other engine": ("vllm_model/engine_api.py", "import sglang"),
    "front imports the other front": ("sglang_model/model.py", "import vllm_model.weights"),
    "sglang outside the room": ("sglang_model/model.py", "from sglang.srt import layers"),
    "patches a class": ("tests/engine_vllm/a.py", "from vllm.x import C\nC.f = g"),
    "patches a module": ("benchmarks/a.py", "import vllm.x\nvllm.x.f = g"),
    "patches through an alias": ("vllm_model/engine_api.py", "import vllm.x as y\ny.f = g"),
    "patches a name of the room": (
        "vllm_model/a.py",
        "from vllm_model.engine_api import C\nC.f = 1",
    ),
    "patches a dict of the engine": ("tests/a.py", "from vllm.x import TABLE\nTABLE['a'] = 1"),
    "patches in a tuple": ("tests/a.py", "from vllm.x import C\na, C.f = 1, 2"),
    "deletes": ("tests/a.py", "from vllm.x import C\ndel C.f"),
    "setattr": ("vllm_model/engine_api.py", "from vllm.x import C\nsetattr(C, 'f', 1)"),
    "monkeypatch": (
        "tests/a.py",
        "from vllm import x\ndef test(monkeypatch):\n    monkeypatch.setattr(x, 'f', 1)",
    ),
    "monkeypatch by string": (
        "tests/a.py",
        "def test(monkeypatch):\n    monkeypatch.setattr('vllm.x.f', 1)",
    ),
    "mock.patch": ("tests/a.py", "from unittest import mock\nmock.patch('vllm.x.f')"),
    "no excuse outside tests": (
        "vllm_model/engine_api.py",
        "import vllm\nvllm.f = 1  # shows a fault",
    ),
    "compares a version": (
        "vllm_model/model.py",
        "import torch\nif torch.__version__ >= '2.9': pass",
    ),
    "compares a parsed version": ("lfm2_plugin/a.py", "ok = Version(v) < Version('1')"),
    "compares metadata": ("lfm2_plugin/a.py", "old = version('torch').split('.')[0] == '2'"),
    "long file": ("lfm2_plugin/a.py", "x = 1\n" * (FILE_LINES + 1)),
    "long function": ("lfm2_plugin/a.py", LONG_FUNCTION),
}
SOUND = {
    "core imports torch": ("lfm2_plugin/arch.py", "import torch, safetensors"),
    "door imports inside a function": (
        "lfm2_plugin/register.py",
        "def f():\n    import vllm, torch",
    ),
    "room imports vllm": ("vllm_model/engine_api.py", "from vllm.config import VllmConfig"),
    "front imports the core": ("vllm_model/model.py", "from lfm2_plugin.arch import Lfm2MoeArch"),
    "a similar name": ("vllm_model/model.py", "import vllm_model.weights, vllmish"),
    "binding a name": ("vllm_model/engine_api.py", "from vllm.x import C\nC = C or None\nOurs = C"),
    "own attributes": (
        "vllm_model/model.py",
        "from vllm_model.engine_api import C\nx = C()\nx.f = 1",
    ),
    "a fault shown": (
        "tests/a.py",
        "import vllm.x\nvllm.x.f = 1  # shows a fault: f drops the bias",
    ),
    "environment": (
        "tests/a.py",
        "def test(monkeypatch):\n    monkeypatch.setenv('VLLM_PLUGINS', '')",
    ),
    "reading a version": ("lfm2_plugin/a.py", "import torch\nprint(torch.__version__)"),
    "version in a test": ("tests/core/a.py", "import x\nassert said == x.__version__"),
    "version in the room": ("vllm_model/engine_api.py", "new = Version(v) > Version('1')"),
    "file at the cap": ("lfm2_plugin/a.py", "x = 1\n" * FILE_LINES),
    "long docstring": ("lfm2_plugin/a.py", LONG_DOCSTRING),
    "long kernel": ("lfm2_plugin/ops/moe/triton.py", LONG_FUNCTION),
}


@pytest.mark.parametrize(("path", "source"), BROKEN.values(), ids=BROKEN)
def test_the_scanner_catches(path: str, source: str):
    assert violations(path, source) != []


@pytest.mark.parametrize(("path", "source"), SOUND.values(), ids=SOUND)
def test_the_scanner_lets_pass(path: str, source: str):
    assert violations(path, source) == []
