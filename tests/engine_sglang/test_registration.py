"""The plugin in the real SGLang: which class serves, what the switches do, and what a broken installation does."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lfm2_plugin.cli.server import ServerFailed
from lfm2_plugin.dispatch import ImpossibleChoice
from lfm2_plugin.register import ARCHITECTURE, SGLANG_CLASS
from lfm2_plugin.switch import PluginError
from sglang_model import registration, support
from sglang_model.config import Lfm2MoeConfig
from sglang_model.engine_api import HuggingFaceConfig
from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.engines import BUILTIN, search_path
from tests.engine_common.references import assert_same, cases
from tests.engine_sglang.serving import served
from tests.tiers import matrix

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
OURS = SGLANG_CLASS.replace(":", ".")
BROKEN = "raise ImportError('libbroken.so: no such file')\n"
TEXT = f"lfm2-plugin can't serve {ARCHITECTURE}: ImportError: libbroken.so: no such file."


def resolved(**environment: str) -> dict:
    """What a process of its own resolves, started like any other."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("LFM2_", "SGLANG_"))}
    variables |= {"PYTHONPATH": search_path(), **environment}
    command = [sys.executable, "-m", "tests.engine_sglang.registration_jobs"]
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=300, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def test_our_class_and_no_other_and_once():
    answer = resolved()
    assert answer["ours"]
    assert Path(answer["file"]).parts[-2:] == ("sglang_model", "model.py")
    assert answer["platform"] == "PortableCpuPlatform"
    assert answer["known before"], (
        "SGLang has a built-in model of this name; without it we replace nothing"
    )
    assert answer["changed"] == [ARCHITECTURE]
    assert answer["added"] == []
    assert answer["changed by a second call"] == []


# What a process that has served with ours leaves to its children.
INHERITED = {"SGLANG_EXTERNAL_MODEL_PACKAGE": "sglang_model.entry"}


@pytest.mark.parametrize(
    "switch",
    [
        pytest.param(BUILTIN | INHERITED, id="off"),
        pytest.param({"SGLANG_PLUGINS": "another"} | INHERITED, id="not among the plugins"),
        matrix(BUILTIN, id="off, nothing inherited"),
    ],
)
def test_switched_off_the_builtin_serves(server, switch):
    """In a process that has our CPU platform: without it SGLang can't be imported here."""
    answer = server.run("registration_jobs:resolve", env=switch).get()
    assert answer["module"] == "sglang.srt.models.lfm2_moe"
    assert answer["changed"] == answer["added"] == []


def test_another_platform_leaves_the_plugin_out(server):
    """SGLang's rule, which one distribution can't get round. The day it serves, docs and doctor can be shortened."""
    answer = server.run("registration_jobs:resolve", env={"SGLANG_PLATFORM": "another"}).get()
    assert answer["module"] == "sglang.srt.models.lfm2_moe"


def test_the_switch_holds_for_each_engine_of_one_process(server):
    values, model = ["on", "off", "on"], str(checkpoint("small"))
    found = server.run("registration_jobs:turn", model=model, values=values).get()
    ours = {
        "config": "sglang_model.config",
        "asked": True,
        "class": "sglang_model.model",
        "left behind": "sglang_model.entry",
    }
    builtin = {
        "config": "sglang.srt.configs.lfm2_moe",
        "asked": False,
        "class": None,  # SGLang keeps its own
        "left behind": None,
    }
    assert found == [ours, builtin, ours]


def test_operators_that_can_not_run_are_refused_while_options_are_settled(server):
    choices, model = ["foo", "triton", "naive"], str(checkpoint("small"))
    job = "registration_jobs:refusals"
    foo, triton, naive = server.run(job, model=model, choices=choices).get()
    assert "LFM2_PLUGIN_OPS=foo is unknown. Set it to one of auto, naive, native" in foo
    assert "LFM2_PLUGIN_OPS=triton" in triton
    assert naive is None


@pytest.mark.parametrize(("backend", "refused"), [("full", True), ("disabled", False)])
def test_operators_that_read_back_are_refused_where_decodes_are_captured(
    monkeypatch, backend, refused
):
    monkeypatch.setenv("LFM2_PLUGIN_OPS", "native")
    graphs = SimpleNamespace(decode=SimpleNamespace(backend=backend))
    options = SimpleNamespace(device="cuda", cuda_graph_config=graphs)
    expected = pytest.raises(ImpossibleChoice, match="--disable-cuda-graph")
    with expected if refused else contextlib.nullcontext():
        support.check_operators(options)


@pytest.mark.parametrize("damage", [None, "hooked"])
def test_what_is_replaced_takes_its_place(server, damage):
    answer = server.run("registration_jobs:replaced", damage=damage).get()
    assert answer == {"class": True, "function": "ours"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("taken", "sglang.srt.lora.lora_manager.LoRAManager, and SGLang runs"),
        ("taken function", "allocation.assign_req_to_token_pool_func, and SGLang runs"),
        ("gone", "LoRAManagerGone, and SGLang .* has no such thing"),
    ],
)
def test_what_does_not_take_its_place_is_an_error(server, damage, words):
    """SGLang logs it, or nothing, and goes on."""
    outcome = server.run("registration_jobs:replaced", damage=damage)
    assert re.search(f"PluginError: lfm2-plugin can't serve this: .*{words}", outcome.error or "")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("config", "it read config.json as transformers.*Lfm2MoeConfig"),
        ("spec", "it would keep conv states by elsewhere.Backend"),
        ("options", "it did not ask the plugin while it resolved its options"),
    ],
)
def test_what_sglang_did_not_take_is_an_error_of_our_model(monkeypatch, damage, words):
    spec = "elsewhere.Backend" if damage == "spec" else registration.STATE_BACKEND
    decided = [] if damage == "options" else [("lfm2-plugin", {})]
    config = HuggingFaceConfig() if damage == "config" else Lfm2MoeConfig()
    found, args = (
        SimpleNamespace(backend_class_name=spec),
        SimpleNamespace(_resolved_overrides=decided),
    )
    monkeypatch.setattr(registration, "get_linear_attn_spec", lambda config: found)
    monkeypatch.setattr(registration, "get_server_args", lambda: args)
    with pytest.raises(PluginError, match=words) as error:
        registration.check_registration(config)
    assert ";" not in str(error.value).partition(": ")[2].partition(". Is")[0], "and nothing else"


def test_one_log_line_says_who_serves(run):
    outcome = run.outcome("small", {"dtype": "float32"}, [])
    assert outcome.log.count(f"LFM2-MoE is served by {OURS}.") == 1
    assert outcome.get()["class"] == [OURS]


MINE = """
from torch import nn
class MineForCausalLM(nn.Module): pass
EntryClass = MineForCausalLM
"""


@pytest.fixture
def users_package(tmp_path: Path) -> tuple[str, dict[str, str]]:
    """A package of the user's own with a model, and the variable that names it."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text(MINE)
    return str(tmp_path), {"SGLANG_EXTERNAL_MODEL_PACKAGE": "mine"}


def test_a_package_of_the_users_own_stays(server, users_package):
    path, env = users_package
    answer = server.run("registration_jobs:resolve", path=path, env=env).get()
    assert answer["ours"]
    assert answer["changed"] == [ARCHITECTURE]
    assert answer["added"] == ["MineForCausalLM"]


def test_serving_beside_a_package_of_the_users_own(server, users_package):
    path, env = users_package
    asked = cases("small", 40)
    steps = [{"prompts": [c.prompt for c in asked]}]
    model, engine = str(checkpoint("small")), {"dtype": "float32"}
    job = "registration_jobs:serve"
    answer = server.run(job, path=path, model=model, engine=engine, steps=steps, env=env).get()
    assert answer["class"] == [OURS]
    assert_same(answer["steps"][0], asked)


def broken_front(folder: Path, **files: str) -> str:
    """A copy of our front with some files' text replaced; the folder that it is in."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sglang_model", folder / "sglang_model", ignore=ignored)
    for name, text in files.items():
        (folder / "sglang_model" / f"{name}.py").write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("file", "users"),
    [
        *[matrix(file, False) for file in ("__init__", "defaults", "conv_state")],
        ("model", False),
        ("defaults", True),
        matrix("model", True),  # beside a package of the user's
    ],
)
def test_a_broken_front_is_not_replaced_by_the_builtin(
    server, tmp_path, users_package, file, users
):
    path = broken_front(tmp_path / "broken", **{file: BROKEN})
    mine, env = users_package if users else ("", {})
    if users:
        shutil.copytree(Path(mine) / "mine", Path(path) / "mine")
    model, engine = str(checkpoint("small")), {"dtype": "float32"}
    job = "registration_jobs:serve"
    outcome = server.run(job, path=path, model=model, engine=engine, steps=[], env=env)
    assert outcome.error is not None, "the engine started"
    assert "libbroken.so: no such file" in outcome.log
    if file in ("defaults", "model"):  # the others break more than the class
        assert TEXT in outcome.log


def test_a_broken_front_stops_a_server(tmp_path):
    """As a user meets it: a command, and processes that import everything themselves."""
    path = broken_front(tmp_path / "broken", model=BROKEN)
    log, options = tmp_path / "log", ["--skip-tokenizer-init"]
    with pytest.raises(ServerFailed), served(checkpoint("small"), options, log, PYTHONPATH=path):
        pass
    assert TEXT in log.read_text()
