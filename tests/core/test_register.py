"""Registration against a stand-in for vLLM: ``pytest tests/core/test_register.py`` (real one: tests/engine_vllm).

Each case runs in a process of its own, with a folder of small fake modules in front of the path.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lfm2_plugin.releases import check_release
from lfm2_plugin.switch import PluginError, switched_off

ROOT = Path(__file__).resolve().parents[2]
SUPPORTED = ("0.32.0", "0.33.0")
VLLM = """
__version__ = {version!r}
class Lazy:
    def __init__(self, module, name): self.module_name, self.class_name = module, name
class Loaded:
    def __init__(self, cls): self.load_model_cls = lambda: cls
class Registry:
    def __init__(self): self.models, self.calls = {{"Other": Lazy("vllm.other", "Other")}}, 0
    def register_model(self, arch, cls):
        self.calls += 1
        if isinstance(cls, str):
            self.models[arch] = Lazy(*cls.split(":"))
        else:
            from torch.nn import Module
            assert issubclass(cls, Module)
            self.models[arch] = Loaded(cls)
ModelRegistry = Registry()
ModelRegistry.models["Lfm2MoeForCausalLM"] = Lazy("vllm.model_executor.models.lfm2_moe", "Lfm2MoeForCausalLM")
"""
FRONT = f"SUPPORTED = {SUPPORTED!r}\n"
CALL_TWICE = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(name)s %(message)s")
from lfm2_plugin.register import register_vllm
register_vllm(); register_vllm()
import vllm
print("CALLS", vllm.ModelRegistry.calls)
from vllm.model_executor.models.config import MODELS_CONFIG_MAP as options
counting = {arch: getattr(entry, "now", entry) for arch, entry in options.items()}
print("OPTIONS", {arch: entry.__module__ for arch, entry in counting.items() if entry})
for arch, entry in vllm.ModelRegistry.models.items():
    entry = getattr(entry, "now", entry)
    if isinstance(entry, vllm.Lazy):
        print("SERVES", arch, entry.module_name + ":" + entry.class_name)
        continue
    entry = entry.load_model_cls()
    print("STUB", arch, entry.__name__)
    for name, call in {
        "built": lambda: entry(vllm_config=None, prefix=""),
        "configured": lambda: options[arch].verify_and_update_model_config(object()),
        "configured last": lambda: options[arch].verify_and_update_config(object()),
    }.items():
        try:
            call()
            print("SERVED", name)
        except Exception as error:
            print("REFUSED", name, type(error).__name__, error)
"""


def fakes(
    folder: Path, *, version: str | None = "0.32.0", front: str = FRONT, model: bool = True
) -> Path:
    """A folder with a fake ``vllm`` and a fake ``vllm_model``."""
    files = {
        "vllm/__init__.py": VLLM.format(version=version),
        "vllm/plugins.py": "from lfm2_plugin.register import register_vllm as load_general_plugins",
        "vllm/model_executor/models/config.py": "MODELS_CONFIG_MAP = {'Other': object}\n",
        "torch/__init__.py": "",
        "torch/nn.py": "class Module: pass\n",
        "vllm_model/__init__.py": front,
        "vllm_model/options.py": "class Lfm2MoeOptions: pass\n",
    }
    if model:
        files["vllm_model/model.py"] = (
            "raise RuntimeError('registration must not import the model')\n"
        )
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    return folder


def call(
    folder: Path, code: str = CALL_TWICE, **environment: str
) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("LFM2_", "VLLM_"))}
    variables |= {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", **environment}
    # -S leaves site-packages out, where the real ones may be; the door needs nothing from there.
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=variables,
        capture_output=True,
        text=True,
        cwd=folder,
    )


def test_overrides_once_and_touches_nothing_else(tmp_path: Path):
    done = call(fakes(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "CALLS 1" in done.stdout
    assert "SERVES Lfm2MoeForCausalLM vllm_model.model:Lfm2MoeForCausalLM" in done.stdout
    assert "SERVES Other vllm.other:Other" in done.stdout
    assert (
        "OPTIONS {'Other': 'builtins', 'Lfm2MoeForCausalLM': 'vllm_model.options'}" in done.stdout
    )
    logged = [line for line in done.stdout.splitlines() if line.startswith(("INFO", "WARNING"))]
    assert len(logged) == 1
    assert logged[0].startswith("INFO vllm.plugins.lfm2 lfm2-plugin serves Lfm2MoeForCausalLM")


@pytest.mark.parametrize("value", ["off", "OFF", " off "])
def test_off_leaves_the_builtin_and_says_so(tmp_path: Path, value: str):
    done = call(fakes(tmp_path), LFM2_PLUGIN=value)
    assert done.returncode == 0, done.stderr
    assert "CALLS 0" in done.stdout
    assert "OPTIONS {'Other': 'builtins'}" in done.stdout
    assert "SERVES Lfm2MoeForCausalLM vllm.model_executor.models.lfm2_moe" in done.stdout
    assert "INFO vllm.plugins.lfm2 LFM2_PLUGIN=off" in done.stdout


TURN = """
import os, sys
from types import ModuleType
from lfm2_plugin.register import ARCHITECTURE, register_vllm
LOADER = "vllm.model_executor.model_loader.utils"
sys.modules[LOADER] = loader = ModuleType(LOADER)
{built}
import vllm
from vllm.model_executor.models.config import MODELS_CONFIG_MAP as options

class Theirs:
    def verify_and_update_model_config(config): print("THEIRS", config)
    def verify_and_update_config(config): print("THEIRS", config)
options[ARCHITECTURE] = Theirs

def look():
    entry = vllm.ModelRegistry.models[ARCHITECTURE]
    options[ARCHITECTURE].verify_and_update_model_config(1)
    options[ARCHITECTURE].verify_and_update_config(2)
    print("SERVES", getattr(entry.now, "module_name", "stub"), len(loader.__dict__.get("_MODEL_ARCH_BY_HASH", ())))
    return hash(entry)
seen = []
for value in ("{values}").split():
    os.environ["LFM2_PLUGIN"] = value
    register_vllm()
    try:
        seen.append(look())
    except Exception as error:
        print("REFUSED", error)
print("HASHES", len(set(seen)))
"""
OPTIONS = """
class Lfm2MoeOptions:
    @staticmethod
    def verify_and_update_model_config(config): print("OURS", config)
    @staticmethod
    def verify_and_update_config(config): print("OURS", config)
"""
ANSWERS = ("REFUSED", "SERVES", "THEIRS")
OURS, BUILTIN = "vllm_model.model", "vllm.model_executor.models.lfm2_moe"


def turned(folder: Path, values: str, built: str = "loader._MODEL_ARCH_BY_HASH = {1: object}"):
    """What vLLM is told after each of the values of LFM2_PLUGIN, in one process."""
    (fakes(folder) / "vllm_model" / "options.py").write_text(OPTIONS)
    done = call(folder, TURN.replace("{values}", values).replace("{built}", built))
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith(("INFO", "ERROR"))]


def test_the_switch_holds_for_each_engine_of_one_process(tmp_path: Path):
    """On, off, on: model, options and what vLLM keeps of classes built before."""
    assert turned(tmp_path, "on off on") == [
        *("OURS 1", "OURS 2", f"SERVES {OURS} 1"),
        *("THEIRS 1", "THEIRS 2", f"SERVES {BUILTIN} 0"),
        *("OURS 1", "OURS 2", f"SERVES {OURS} 0"),
        "HASHES 2",  # vLLM keeps answers by it
    ]


def test_so_it_does_from_off(tmp_path: Path):
    assert turned(tmp_path, "off on") == [
        *("THEIRS 1", "THEIRS 2", f"SERVES {BUILTIN} 1"),
        *("OURS 1", "OURS 2", f"SERVES {OURS} 0"),
        "HASHES 2",
    ]


def test_a_vllm_whose_kept_classes_are_out_of_reach_refuses_the_change(tmp_path: Path):
    first, second, _ = [line for line in turned(tmp_path, "on off", built="") if line != "OURS 1"][
        1:
    ]
    assert first == f"SERVES {OURS} 0"
    assert "REFUSED lfm2-plugin can't serve" in second
    assert "start a new process" in second


def test_a_model_that_can_not_serve_gives_way_to_the_builtin(tmp_path: Path):
    """Registration failed with the switch on; turned off, no stub of it is in the way."""
    folder = fakes(tmp_path)
    (folder / "vllm_model" / "__init__.py").write_text("raise ImportError('libbroken.so')")
    done = call(folder, TURN.replace("{values}", "on off").replace("{built}", ""))
    lines = [line for line in done.stdout.splitlines() if line.startswith(ANSWERS)]
    assert "libbroken.so" in lines[0]
    assert lines[1:] == ["THEIRS 1", "THEIRS 2", f"SERVES {BUILTIN} 0"]


def test_a_switch_that_is_neither_on_nor_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LFM2_PLUGIN", "nope")
    with pytest.raises(
        PluginError, match="LFM2_PLUGIN='nope' is not understood: set it to 'on' or 'off'"
    ):
        switched_off()


def test_vllm_absent(tmp_path: Path):
    folder = fakes(tmp_path)
    shutil.rmtree(folder / "vllm")
    done = call(folder)
    assert done.returncode == 1
    assert "PluginError: vLLM is not installed in this Python: pip install" in done.stderr


def refusals(said: str) -> list[str]:
    """What each way into a stub for our architecture answered; the other architecture is served as before."""
    assert "SERVES Other vllm.other:Other" in said
    assert "STUB Lfm2MoeForCausalLM Lfm2MoeForCausalLM" in said
    assert "SERVED" not in said
    lines = [line for line in said.splitlines() if line.startswith("REFUSED")]
    assert len(lines) == 3
    assert all("PluginError lfm2-plugin can't serve Lfm2MoeForCausalLM" in line for line in lines)
    assert all("LFM2_PLUGIN=off" in line for line in lines)
    return lines


def test_a_release_too_old_refuses_our_architecture_alone(tmp_path: Path):
    done = call(fakes(tmp_path, version="0.31.2"))
    assert done.returncode == 0, done.stderr
    for line in refusals(done.stdout):
        assert "vLLM 0.31.2 is too old for lfm2-plugin, which supports 0.32.0 to 0.33.0" in line
        assert "upgrade vLLM" in line
    logged = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    assert logged
    assert "vLLM 0.31.2 is too old" in logged[0]
    assert "Traceback" not in done.stdout


def test_a_release_without_the_table_of_options_refuses_when_the_model_is_built(tmp_path: Path):
    folder = fakes(tmp_path, version="0.9.2")
    shutil.rmtree(folder / "vllm" / "model_executor")
    code = """
from lfm2_plugin.register import register_vllm
register_vllm()
import vllm
vllm.ModelRegistry.models["Lfm2MoeForCausalLM"].load_model_cls()(vllm_config=None)
"""
    done = call(folder, code)
    assert done.returncode == 1
    assert "PluginError: lfm2-plugin can't serve" in done.stderr
    assert "vLLM 0.9.2 is too old" in done.stderr


def test_the_doctor_is_told_what_the_stub_raises(tmp_path: Path):
    code = "from lfm2_plugin.register import resolve_vllm; print('FOUND', resolve_vllm())"
    done = call(fakes(tmp_path, version="0.31.2"), code)
    assert done.returncode == 1
    assert "FOUND" not in done.stdout
    assert "vLLM 0.31.2 is too old" in done.stderr.splitlines()[-1]


def test_a_source_build_without_tags_is_registered_with_one_warning(tmp_path: Path):
    done = call(fakes(tmp_path, version="0.1.dev1+gabcdef123"))
    assert done.returncode == 0, done.stderr
    assert "SERVES Lfm2MoeForCausalLM vllm_model.model:Lfm2MoeForCausalLM" in done.stdout
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "vLLM '0.1.dev1+gabcdef123' has no release number" in warnings[0]


def test_newer_is_registered_with_one_warning(tmp_path: Path):
    done = call(fakes(tmp_path, version="0.34.0"))
    assert done.returncode == 0, done.stderr
    assert "SERVES Lfm2MoeForCausalLM vllm_model.model:Lfm2MoeForCausalLM" in done.stdout
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "vLLM 0.34.0 is newer than 0.33.0" in warnings[0]


def test_a_vllm_that_tells_no_version_refuses_our_architecture_alone(tmp_path: Path):
    done = call(fakes(tmp_path, version=None))
    assert done.returncode == 0, done.stderr
    assert all("TypeError" in line for line in refusals(done.stdout))


def test_a_vllm_with_other_tables_refuses_our_architecture_alone(tmp_path: Path):
    """Nothing that registration meets may stop vLLM for other models."""
    folder = fakes(tmp_path)
    with (folder / "vllm" / "__init__.py").open("a") as file:
        file.write("""
class Registry:
    def register_model(self, arch, cls): self.stub = cls
ModelRegistry = Registry()
""")
    code = """
from lfm2_plugin.register import register_vllm
register_vllm()
import vllm
vllm.ModelRegistry.stub(vllm_config=None)
"""
    done = call(folder, code)
    assert "PluginError: lfm2-plugin can't serve" in done.stderr
    assert "has no attribute 'models'" in done.stderr


def test_a_broken_front_refuses_our_architecture_alone(tmp_path: Path):
    done = call(fakes(tmp_path, front="raise ImportError('libbroken.so')\n"))
    assert done.returncode == 0, done.stderr
    assert all("ImportError: libbroken.so" in line for line in refusals(done.stdout))
    assert "Traceback" in done.stdout  # in the log: nobody foresaw this one


def test_a_front_without_its_model_refuses_our_architecture_alone(tmp_path: Path):
    done = call(fakes(tmp_path, model=False))
    assert done.returncode == 0, done.stderr
    for line in refusals(done.stdout):
        assert "vllm_model.model is missing beside" in line
        assert "reinstall" in line


def test_a_switch_not_understood_refuses_our_architecture_alone(tmp_path: Path):
    done = call(fakes(tmp_path), LFM2_PLUGIN="maybe")
    assert done.returncode == 0, done.stderr
    assert all("LFM2_PLUGIN='maybe' is not understood" in r for r in refusals(done.stdout))


@pytest.mark.parametrize(
    "version", ["0.32.0", "0.32.4", "0.33.0", "0.33.1", "0.33.0+cpu", "0.33.1.dev3+gab"]
)
def test_releases_inside_the_range(version: str):
    assert check_release(version, SUPPORTED) is None


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("0.34.0", "newer than 0.33.0"),
        ("0.34.0rc1", "newer than 0.33.0"),
        ("1.0", "newer than 0.33.0"),
        ("dev", "no release number"),
        ("0.1.dev16384+g0123abc", "no release number"),
        ("0.0.0.dev0", "no release number"),
    ],
)
def test_releases_that_are_warned_of(version: str, text: str):
    assert text in (check_release(version, SUPPORTED) or "")


@pytest.mark.parametrize("version", ["0.31.9", "0.9.2", "0.1.7", "0.31.2.dev1+g1"])
def test_releases_that_are_refused(version: str):
    with pytest.raises(PluginError, match=r"too old .* supports 0\.32\.0 to 0\.33\.0"):
        check_release(version, SUPPORTED)
