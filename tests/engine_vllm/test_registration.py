"""The plugin in the real vLLM, one fresh process a case: ``pytest tests/engine_vllm/test_registration.py``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig
from vllm import __version__ as vllm_version

from lfm2_plugin.register import ARCHITECTURE, VLLM_CLASS
from tests.tiny import make_config

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
BUILTIN = "vllm.model_executor.models.lfm2_moe"
# What `vllm serve` does first; without it nothing below a warning is shown.
LOGGING = """
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging
configure_logging(LoggingConfig())
"""
RESOLVE = f"""
{LOGGING}
import json
from lfm2_plugin.register import register_vllm, resolve_vllm
from vllm import ModelRegistry
before = dict(ModelRegistry.models)
answer = resolve_vllm()
after = dict(ModelRegistry.models)
register_vllm()
again = dict(ModelRegistry.models)
print("RESULT", json.dumps(answer | {{
    "known before": "{ARCHITECTURE}" in before,
    "changed": sorted(a for a in after if after[a] is not before.get(a)),
    "gone": sorted(set(before) - set(after)),
    "changed by a second call": sorted(a for a in again if again[a] is not after[a]),
}}))
"""
# What `vllm serve` does with a model's config before it starts anything.
CONFIGURE = """
import sys
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, load_format="dummy").create_model_config()
print("ARCHITECTURE", config.architecture)
"""


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k not in ("LFM2_PLUGIN", "VLLM_PLUGINS")}
    variables["VLLM_LOGGING_COLOR"] = "0"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, env=variables | environment, capture_output=True, text=True, timeout=900, cwd="/"
    )


def result(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def shadow(folder: Path, **files: str) -> dict[str, str]:
    """A ``vllm_model`` in front of the installed one; the environment that puts it there."""
    package = folder / "vllm_model"
    package.mkdir()
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    return {"PYTHONPATH": str(folder), "VLLM_CACHE_ROOT": str(folder / "cache")}


@pytest.fixture
def config_folder(tmp_path: Path) -> str:
    config = make_config()
    config.architectures = [ARCHITECTURE]
    config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture(scope="module")
def ours() -> subprocess.CompletedProcess[str]:
    return run(RESOLVE)


def test_vllm_resolves_our_class(ours: subprocess.CompletedProcess[str]):
    answer = result(ours)
    assert answer["ours"]
    assert answer["module"] == VLLM_CLASS.partition(":")[0]
    assert Path(answer["file"]).parts[-2:] == ("vllm_model", "model.py")


def test_only_our_architecture_changes_and_only_once(ours: subprocess.CompletedProcess[str]):
    answer = result(ours)
    assert answer["known before"], (
        "vLLM has a built-in model of this name; without it we override nothing"
    )
    assert answer["changed"] == [ARCHITECTURE]
    assert answer["gone"] == []
    assert answer["changed by a second call"] == []


def test_one_log_line_in_vllms_own_style(ours: subprocess.CompletedProcess[str]):
    (line,) = (line for line in (ours.stdout + ours.stderr).splitlines() if "lfm2-plugin" in line)
    assert " INFO " in line
    assert "[register.py:" in line
    assert f"lfm2-plugin serves {ARCHITECTURE} in place of the built-in model" in line


@pytest.mark.parametrize(
    "switch",
    [{"LFM2_PLUGIN": "off"}, {"VLLM_PLUGINS": ""}],
    ids=["LFM2_PLUGIN=off", "VLLM_PLUGINS="],
)
def test_switched_off_the_builtin_serves(switch: dict[str, str]):
    done = run(RESOLVE, **switch)
    answer = result(done)
    assert not answer["ours"]
    assert answer["module"] == BUILTIN
    said = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if "LFM2_PLUGIN=off: vLLM serves" in line
    ]
    assert bool(said) == ("LFM2_PLUGIN" in switch)


# A front for which this vLLM is too old, in every process.
TOO_OLD = "SUPPORTED = ('99.0.0', '99.1.0')"


def test_a_vllm_too_old_refuses_our_architecture_with_one_error(tmp_path: Path, config_folder: str):
    """It is raised in the process that the user started."""
    done = run(CONFIGURE, config_folder, **shadow(tmp_path, __init__=TOO_OLD))
    assert done.returncode != 0
    assert "ARCHITECTURE" not in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert f"PluginError: lfm2-plugin can't serve {ARCHITECTURE}" in last
    assert (
        f"vLLM {vllm_version} is too old for lfm2-plugin, which supports 99.0.0 to 99.1.0" in last
    )
    assert "LFM2_PLUGIN=off" in last


def test_a_vllm_too_old_serves_every_other_architecture(tmp_path: Path):
    LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "llama")  # fmt: skip
    done = run(CONFIGURE, str(tmp_path / "llama"), **shadow(tmp_path, __init__=TOO_OLD))
    said = done.stdout + done.stderr
    assert "ARCHITECTURE LlamaForCausalLM" in said
    assert f"lfm2-plugin can't serve {ARCHITECTURE}: vLLM {vllm_version} is too old" in said


def test_a_broken_model_is_not_replaced_by_the_builtin(tmp_path: Path, config_folder: str):
    files = {
        "__init__": (ROOT / "vllm_model" / "__init__.py").read_text(),
        "model": "raise ImportError('libbroken.so: no such file')",
    }
    done = run(CONFIGURE, config_folder, **shadow(tmp_path, **files))
    assert done.returncode != 0
    assert "ARCHITECTURE" not in done.stdout
    assert "libbroken.so: no such file" in done.stdout + done.stderr


def test_the_whole_model_passes_vllms_inspection(tmp_path: Path, config_folder: str):
    """The counterpart of the test above: the same call succeeds with the real front."""
    done = run(CONFIGURE, config_folder, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    assert f"ARCHITECTURE {ARCHITECTURE}" in done.stdout, done.stdout + done.stderr
