"""What a server refuses, at its start or while it answers: over HTTP, as a user meets it."""

from pathlib import Path

import httpx
import pytest

from lfm2_plugin.cli.server import ServerFailed
from tests.engine_common.adapter_checks import MODEL, refuses_and_goes_on
from tests.engine_common.checkpoints import checkpoint
from tests.engine_sglang.serving import served
from tests.tiers import matrix

pytestmark = pytest.mark.engine

OPTIONS = ["--dtype", "float32", "--context-length", "2048"]
LORA = ["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "all"]


@pytest.mark.matrix
def test_a_refused_adapter_leaves_the_server_serving(tmp_path: Path):
    with served(checkpoint(MODEL), [*OPTIONS, *LORA], tmp_path / "log") as url:

        def load(name: str, folder: Path) -> str:
            sent = {"lora_name": name, "lora_path": str(folder)}
            reply = httpx.post(f"{url}/load_lora_adapter", json=sent, timeout=60)
            return "" if reply.status_code == 200 else reply.json()["error_message"]

        def generate(prompts: list[list[int]], adapter: str | None) -> list[dict]:
            settings = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
            sent = {"input_ids": prompts, "sampling_params": settings}
            sent |= {"lora_path": adapter} if adapter else {}
            reply = httpx.post(f"{url}/generate", json=sent, timeout=300)
            assert reply.status_code == 200, reply.text
            return [{"tokens": out["output_ids"]} for out in reply.json()]

        refuses_and_goes_on(tmp_path / "bad", load, generate)


@pytest.mark.matrix
def test_a_bad_adapter_among_the_options_stops_the_server(tmp_path: Path):
    log = tmp_path / "log"
    options = [*OPTIONS, *LORA, "--lora-paths", f"mine={tmp_path}"]
    with pytest.raises(ServerFailed), served(checkpoint(MODEL), options, log):
        pass
    assert "There is no adapter_config.json" in log.read_text()


@pytest.mark.parametrize("choice", ["foo", matrix("triton")])
def test_operators_that_can_not_run_stop_the_server(tmp_path: Path, choice: str):
    """Before it loads a weight, and so before its /health says yes."""
    log = tmp_path / "log"
    environment = {"LFM2_PLUGIN_OPS": choice}
    with (
        pytest.raises(ServerFailed),
        served(checkpoint(MODEL), OPTIONS, log, **environment),
    ):
        pass
    assert f"LFM2_PLUGIN_OPS={choice}" in log.read_text()
    assert "Load weight begin" not in log.read_text()
