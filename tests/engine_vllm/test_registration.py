"""The plugin in the real vLLM: which class serves, what the switches do, and what a broken installation does.

Each case runs in a child of a process that has imported vLLM, and loads the plugins anew.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig
from vllm import __version__ as vllm_version
from vllm.config import CUDAGraphMode

from lfm2_plugin.dispatch import ImpossibleChoice
from lfm2_plugin.register import ARCHITECTURE, VLLM_CLASS
from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.engines import Outcome
from tests.engine_common.references import assert_same, cases
from tests.tiny import make_config
from vllm_model import engine_api, support

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
OURS = VLLM_CLASS.replace(":", ".")
BUILTIN = "vllm.model_executor.models.lfm2_moe"


def shadow(folder: Path, **files: str) -> str:
    """A folder with a ``vllm_model`` to be put in front of the installed one."""
    package = folder / "vllm_model"
    package.mkdir()
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    return str(folder)


@pytest.fixture
def configure(server, tmp_path: Path):
    """What vLLM makes of a model's config; with a folder of caches of its own, so that it looks at the class."""

    def ask(model: str, path: str | None = None) -> Outcome:
        env = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
        return server.run("registration_jobs:configure", model=model, path=path, env=env)

    return ask


@pytest.fixture
def config_folder(tmp_path: Path) -> str:
    config = make_config()
    config.architectures = [ARCHITECTURE]
    config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture(scope="module")
def ours(server) -> Outcome:
    return server.run("registration_jobs:resolve", env={"VLLM_LOGGING_COLOR": "0"})


def test_vllm_resolves_our_class(ours: Outcome):
    answer = ours.get()
    assert answer["ours"]
    assert answer["module"] == VLLM_CLASS.partition(":")[0]
    assert Path(answer["file"]).parts[-2:] == ("vllm_model", "model.py")


def test_only_our_architecture_changes_and_only_once(ours: Outcome):
    answer = ours.get()
    assert answer["known before"], (
        "vLLM has a built-in model of this name; without it we override nothing"
    )
    assert answer["changed"] == [ARCHITECTURE]
    assert answer["gone"] == []
    assert answer["changed by a second call"] == []


def test_one_log_line_in_vllms_own_style(ours: Outcome):
    (line,) = (line for line in ours.log.splitlines() if "lfm2-plugin" in line)
    assert " INFO " in line
    assert "[register.py:" in line
    assert f"lfm2-plugin serves {ARCHITECTURE} in place of the built-in model" in line


@pytest.mark.parametrize(
    "switch",
    [{"LFM2_PLUGIN": "off"}, {"VLLM_PLUGINS": ""}],
    ids=["LFM2_PLUGIN=off", "VLLM_PLUGINS="],
)
def test_switched_off_the_builtin_serves(server, switch: dict[str, str]):
    outcome = server.run("registration_jobs:resolve", env=switch)
    answer = outcome.get()
    assert not answer["ours"]
    assert answer["module"] == BUILTIN
    said = [line for line in outcome.log.splitlines() if "LFM2_PLUGIN=off: vLLM serves" in line]
    assert bool(said) == ("LFM2_PLUGIN" in switch)


def test_the_switch_holds_for_each_engine_of_one_process(server):
    """The class, though vLLM keeps the one that it built of a checkpoint, and the options."""
    values = ["on", "off", "on", "off"]
    found = server.run("registration_jobs:turn", model=str(checkpoint("small")), values=values)
    builtin = f"{BUILTIN}.{ARCHITECTURE}"
    assert found.get() == [
        {"class": OURS if value == "on" else builtin, "our options": value == "on"}
        for value in values
    ]


def test_each_engine_of_one_process_is_built_by_the_switch(server):
    asked = cases("small", 40)[:4]
    job, values = "registration_jobs:serve_each", ["on", "off", "on"]
    prompts, model = [case.prompt for case in asked], str(checkpoint("small"))
    found = server.run(job, model=model, values=values, prompts=prompts).get()
    assert [each["class"] for each in found] == [[OURS], [f"{BUILTIN}.{ARCHITECTURE}"], [OURS]]
    for each in (found[0], found[2]):
        assert_same(each["outputs"], asked)


def test_operators_that_can_not_run_are_refused_before_any_process_starts(server):
    choices = ["foo", "triton", "naive"]
    model = str(checkpoint("small"))
    foo, triton, naive = server.run(
        "registration_jobs:refusals", model=model, choices=choices
    ).get()
    assert "LFM2_PLUGIN_OPS=foo is unknown. Set it to one of auto, naive, native" in foo["error"]
    assert "LFM2_PLUGIN_OPS=triton" in triton["error"]
    assert "unset LFM2_PLUGIN_OPS" in triton["error"].replace("Unset", "unset")
    assert naive["error"] is None
    assert foo["processes"] == triton["processes"] == 0


@pytest.mark.parametrize(
    ("mode", "eager", "gpu", "whole"),
    [
        (None, False, True, True),  # not settled yet: the default has them
        (CUDAGraphMode.FULL_AND_PIECEWISE, False, True, True),
        (CUDAGraphMode.FULL_DECODE_ONLY, False, True, True),
        (CUDAGraphMode.PIECEWISE, False, True, False),
        (CUDAGraphMode.NONE, False, True, False),
        (None, True, True, False),
        (None, False, False, False),
    ],
)
def test_operators_that_read_back_are_refused_where_whole_steps_are_captured(
    monkeypatch: pytest.MonkeyPatch, mode, eager: bool, gpu: bool, whole: bool
):
    monkeypatch.setenv("LFM2_PLUGIN_OPS", "native")
    monkeypatch.setattr(engine_api, "captures_graphs", lambda: gpu)
    monkeypatch.setattr(support, "device_type", lambda: "cuda" if gpu else "cpu")
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=mode),
        model_config=SimpleNamespace(enforce_eager=eager),
        parallel_config=None,
    )
    refusal = ImpossibleChoice if whole else AttributeError  # the checks that come next
    with pytest.raises(refusal, match="reads values back" if whole else "tensor_parallel_size"):
        support.check_support(None, config)


# A front for which this vLLM is too old, in every process.
TOO_OLD = "SUPPORTED = ('99.0.0', '99.1.0')"


def test_a_vllm_too_old_refuses_our_architecture_with_one_error(
    configure, tmp_path: Path, config_folder: str
):
    """It is raised in the process that the user started."""
    outcome = configure(config_folder, shadow(tmp_path, __init__=TOO_OLD))
    assert outcome.error.startswith("PluginError: ")
    assert f"lfm2-plugin can't serve {ARCHITECTURE}" in outcome.error
    words = f"vLLM {vllm_version} is too old for lfm2-plugin, which supports 99.0.0 to 99.1.0"
    assert words in outcome.error
    assert "LFM2_PLUGIN=off" in outcome.error


def test_a_vllm_too_old_serves_every_other_architecture(configure, tmp_path: Path):
    LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "llama")  # fmt: skip
    outcome = configure(str(tmp_path / "llama"), shadow(tmp_path, __init__=TOO_OLD))
    assert outcome.get() == "LlamaForCausalLM"
    assert f"lfm2-plugin can't serve {ARCHITECTURE}: vLLM {vllm_version} is too old" in outcome.log


def test_a_broken_model_is_not_replaced_by_the_builtin(
    configure, tmp_path: Path, config_folder: str
):
    files = {
        "__init__": (ROOT / "vllm_model" / "__init__.py").read_text(),
        "options": (ROOT / "vllm_model" / "options.py").read_text(),
        "model": "raise ImportError('libbroken.so: no such file')",
    }
    outcome = configure(config_folder, shadow(tmp_path, **files))
    assert outcome.error is not None
    assert "libbroken.so: no such file" in outcome.log


def test_the_whole_model_passes_vllms_inspection(configure, config_folder: str):
    """The counterpart of the test above: the same call succeeds with the real front."""
    outcome = configure(config_folder)
    assert outcome.get() == ARCHITECTURE
