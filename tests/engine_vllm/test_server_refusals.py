"""What a server refuses, at its start or while it answers: over HTTP, as a user meets it."""

from pathlib import Path

import httpx
import pytest

from lfm2_plugin.cli.demo import NAME
from lfm2_plugin.cli.server import ServerFailed
from tests.engine_common.adapter_checks import MODEL, refuses_and_goes_on
from tests.engine_common.checkpoints import checkpoint
from tests.engine_vllm.serving import served
from tests.tiers import matrix

pytestmark = pytest.mark.engine

OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]


@pytest.mark.matrix
def test_a_refused_adapter_leaves_the_server_serving(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    options = [*OPTIONS, "--enable-lora", "--max-lora-rank", "8"]
    with served(checkpoint(MODEL), options, tmp_path / "log") as url:

        def load(name: str, folder: Path) -> str:
            sent = {"lora_name": name, "lora_path": str(folder)}
            reply = httpx.post(f"{url}/v1/load_lora_adapter", json=sent, timeout=60)
            return "" if reply.status_code == 200 else reply.json()["error"]["message"]

        def generate(prompts: list[list[int]], adapter: str | None) -> list[dict]:
            sent = {"model": adapter or NAME, "prompt": prompts, "temperature": 0}
            sent |= {"max_tokens": 16, "ignore_eos": True, "return_token_ids": True}
            reply = httpx.post(f"{url}/v1/completions", json=sent, timeout=300)
            assert reply.status_code == 200, reply.text
            return [{"tokens": choice["token_ids"]} for choice in reply.json()["choices"]]

        refuses_and_goes_on(tmp_path / "bad", load, generate)


@pytest.mark.matrix
def test_a_bad_adapter_among_the_options_stops_the_server(tmp_path: Path):
    log = tmp_path / "log"
    options = [*OPTIONS, "--enable-lora", "--lora-modules", f"mine={tmp_path}"]
    with pytest.raises(ServerFailed), served(checkpoint(MODEL), options, log):
        pass
    assert "LoRA adapter 'mine'" in log.read_text()


@pytest.mark.parametrize("choice", ["foo", matrix("triton")])
def test_operators_that_can_not_run_stop_the_server(tmp_path: Path, monkeypatch, choice: str):
    """Before it loads a weight, and so before its /health says yes."""
    monkeypatch.setenv("LFM2_PLUGIN_OPS", choice)
    log = tmp_path / "log"
    with pytest.raises(ServerFailed), served(checkpoint(MODEL), OPTIONS, log):
        pass
    assert f"LFM2_PLUGIN_OPS={choice}" in log.read_text()
    assert "Loading weights" not in log.read_text()
