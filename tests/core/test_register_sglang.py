"""Registration against a stand-in: ``pytest tests/core/test_register_sglang.py`` (real SGLang: tests/engine_sglang).

SGLang only logs what a plugin raises, so every failure has to show in the class that it will build.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FRONT = 'SUPPORTED = ("0.5.22", "0.5.23")\n'
DEFAULTS = "def declare(): print('DECLARED')\ndef withdraw(): print('WITHDRAWN')\n"
HOOKS = """
STEPS = {}
def register_resolution_hook(name):
    def keep(hook):
        assert name not in STEPS
        STEPS[name] = hook
    return keep
"""
MODEL = "class Lfm2MoeForCausalLM:\n    def __init__(self, config): pass\n"
REGISTRY = """
class Registry:
    def register(self, package, overwrite, strict): print("ASKED", package, overwrite, strict)
ModelRegistry = Registry()
"""
# As SGLang does: the plugin in a net, then the registry's import of the package that the variable names.
SERVE = """
import importlib, logging, os, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(name)s %(message)s")
from lfm2_plugin.register import register_sglang
register_sglang(); register_sglang()
package = os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE", "none")
print("PACKAGE", package)
if package == "sglang_model.entry":
    cls = importlib.import_module("sglang_model.entry.lfm2_moe").EntryClass
    print("NAME", cls.__name__)
    try:
        cls(config=None)
        print("BUILT", cls.__module__)
    except Exception as error:
        print("REFUSED", error)
"""


def fakes(folder: Path, **files: str) -> Path:
    """A folder with a fake ``sglang`` and a fake ``sglang_model`` around the real entry module."""
    entry = (ROOT / "sglang_model" / "entry" / "lfm2_moe.py").read_text()
    contents = {
        "sglang/__init__.py": "",
        "sglang/version.py": '__version__ = "0.5.23"\n',
        "sglang/srt/models/registry.py": REGISTRY,
        "sglang/srt/arg_groups/resolution_hooks.py": HOOKS,
        "sglang_model/__init__.py": FRONT,
        "sglang_model/defaults.py": DEFAULTS,
        "sglang_model/model.py": MODEL,
        "sglang_model/entry/__init__.py": "",
        "sglang_model/entry/lfm2_moe.py": entry,
        **files,
    }
    for name, text in contents.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    return folder


def call(folder: Path, code: str = SERVE, **environment: str) -> str:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("LFM2_", "SGLANG_"))}
    variables |= {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", **environment}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=variables, capture_output=True, text=True, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_our_class_is_named_and_built(tmp_path: Path):
    said = call(fakes(tmp_path))
    assert "PACKAGE sglang_model.entry" in said
    assert "BUILT sglang_model.model" in said
    assert "DECLARED" in said
    assert "WARNING" not in said


def test_off_leaves_the_builtin_and_says_so(tmp_path: Path):
    said = call(fakes(tmp_path), LFM2_PLUGIN="off")
    assert "PACKAGE none" in said
    assert "DECLARED" not in said
    assert "LFM2_PLUGIN=off: SGLang serves Lfm2MoeForCausalLM with its built-in model" in said


def test_a_package_of_the_users_own_stays(tmp_path: Path):
    said = call(fakes(tmp_path), SGLANG_EXTERNAL_MODEL_PACKAGE="theirs")
    assert "PACKAGE theirs" in said
    assert "ASKED sglang_model.entry True True" in said


INHERITED = {"SGLANG_EXTERNAL_MODEL_PACKAGE": "sglang_model.entry"}  # from a parent that served
ENTRY = """
import importlib
entry = importlib.import_module("sglang_model.entry.lfm2_moe")
print("ENTRY", getattr(entry, "EntryClass", None))
"""


def test_off_undoes_what_was_inherited(tmp_path: Path):
    said = call(fakes(tmp_path), SERVE + ENTRY, LFM2_PLUGIN="off", **INHERITED)
    assert "PACKAGE none" in said
    assert "ENTRY None" in said


def test_a_child_without_the_plugin_finds_nothing_in_what_it_inherited(tmp_path: Path):
    """As with SGLANG_PLUGINS: SGLang's registry imports the package, the plugin was not called."""
    assert call(fakes(tmp_path), ENTRY, **INHERITED) == "ENTRY None\n"


# As each engine of a process does: the plugin is called once, the steps of the options for each engine.
TURN = """
import os
from lfm2_plugin.register import register_sglang, serves_in_sglang, sglang_failure
for engine, value in enumerate("{}".split()):
    os.environ["LFM2_PLUGIN"] = value
    if engine == 0:
        register_sglang()
    from sglang.srt.arg_groups.resolution_hooks import STEPS
    (step,) = STEPS.values()
    step(engine, lambda options: print("OPTIONS", options))
    package = os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE", "none")
    print("SERVES", serves_in_sglang(), package, sglang_failure())
"""


def test_the_switch_holds_for_each_engine_of_one_process(tmp_path: Path):
    ours, theirs = "SERVES True sglang_model.entry None", "SERVES False none None"
    assert call(fakes(tmp_path), TURN.format("on off on")).splitlines() == [
        *("DECLARED", "OPTIONS 0", ours),
        *("WITHDRAWN", "OPTIONS 1", theirs),
        *("DECLARED", "OPTIONS 2", ours),
    ]


def test_so_it_does_from_off_and_past_a_value_not_understood(tmp_path: Path):
    said = call(fakes(tmp_path), TURN.format("off maybe off on")).splitlines()
    served = [line for line in said if line.startswith("SERVES")]
    assert served[0] == served[2] == "SERVES False none None"
    assert "'maybe' is not understood" in served[1]
    assert served[3] == "SERVES True sglang_model.entry None"


def test_a_sglang_without_that_step_says_that_the_switch_is_fixed(tmp_path: Path):
    hooks = "def register_resolution_hook(name): raise ValueError(f'no step {name}')\n"
    said = call(fakes(tmp_path, **{"sglang/srt/arg_groups/resolution_hooks.py": hooks}))
    assert "BUILT sglang_model.model" in said
    assert "LFM2_PLUGIN can't be changed within this process, with this SGLang: no step" in said


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"sglang_model/model.py": "import no_such_layer\n"}, "No module named 'no_such_layer'"),
        ({"sglang_model/defaults.py": "import gone_from_sglang\n"}, "gone_from_sglang"),
        ({"sglang/version.py": '__version__ = "0.5.21"\n'}, "SGLang 0.5.21 is too old"),
    ],
    ids=["model", "defaults", "version"],
)
def test_a_failure_is_raised_by_the_class(tmp_path: Path, files: dict[str, str], text: str):
    said = call(fakes(tmp_path, **files))
    assert "NAME Lfm2MoeForCausalLM" in said
    assert "REFUSED lfm2-plugin can't serve Lfm2MoeForCausalLM" in said
    assert text in said.partition("REFUSED")[2]
    assert "LFM2_PLUGIN=off" in said.partition("REFUSED")[2]


def test_a_front_that_can_not_be_imported_stops_the_registry(tmp_path: Path):
    """SGLang imports the package itself without a net."""
    front = "raise ImportError('libbroken.so')\n"
    with pytest.raises(AssertionError, match=r"ImportError: libbroken\.so"):
        call(fakes(tmp_path, **{"sglang_model/__init__.py": front}))


def test_a_switch_not_understood_is_raised_by_the_class(tmp_path: Path):
    said = call(fakes(tmp_path), LFM2_PLUGIN="maybe")
    assert "LFM2_PLUGIN='maybe' is not understood" in said.partition("REFUSED")[2]


@pytest.mark.parametrize(("version", "warned"), [("0.5.24", True), ("0.5.22", False)])
def test_a_newer_release_is_served_with_a_warning(tmp_path: Path, version: str, warned: bool):
    said = call(fakes(tmp_path, **{"sglang/version.py": f"__version__ = {version!r}\n"}))
    assert "BUILT sglang_model.model" in said
    assert (f"SGLang {version} is newer than 0.5.23" in said) == warned


def test_a_source_tree_without_a_version_is_served_with_a_warning(tmp_path: Path):
    said = call(fakes(tmp_path, **{"sglang/version.py": "__version__ = '0.0.0.dev0'\n"}))
    assert "BUILT sglang_model.model" in said
    assert "SGLang '0.0.0.dev0' has no release number" in said


def test_a_sglang_that_tells_no_version_is_refused_by_the_class(tmp_path: Path):
    said = call(fakes(tmp_path, **{"sglang/version.py": "__version__ = None\n"}))
    assert "REFUSED lfm2-plugin can't serve Lfm2MoeForCausalLM: TypeError" in said


PLATFORM = "from lfm2_plugin.register import sglang_cpu_platform; print(sglang_cpu_platform())"
TORCH = "class accelerator:\n    is_available = staticmethod(lambda: {})\n"


@pytest.mark.parametrize(
    ("gpu", "kernels", "environment", "active"),
    [
        (False, False, {}, True),
        (True, False, {}, False),
        (False, True, {}, False),
        (False, False, {"SGLANG_USE_CPU_ENGINE": "1"}, False),
        (True, True, {"SGLANG_PLATFORM": "lfm2_cpu"}, True),
        (False, False, {"LFM2_PLUGIN": "off"}, False),
    ],
    ids=["bare", "gpu", "sgl_kernel", "own engine", "asked for", "off"],
)
def test_the_cpu_platform_steps_in_only_where_nothing_else_runs(
    tmp_path: Path, gpu: bool, kernels: bool, environment: dict[str, str], active: bool
):
    folder = fakes(tmp_path, **{"torch.py": TORCH.format(gpu)})
    if kernels:
        (folder / "sgl_kernel.py").write_text("")
    said = call(folder, PLATFORM, **environment)
    assert said.strip() == ("sglang_model.cpu_platform:PortableCpuPlatform" if active else "None")
