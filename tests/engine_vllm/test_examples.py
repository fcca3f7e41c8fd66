"""The examples and ``lfm2 demo`` with the demo model: ``pytest tests/engine_vllm/test_examples.py``."""

import re
import sys
from pathlib import Path

import pytest
from example_runs import EXAMPLES, kept_demo, run

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def demo():
    with kept_demo() as found:
        yield found


def test_the_demo_answers_right_and_names_our_class(demo: tuple[str, str]):
    _, printed = demo
    assert re.search(r"served by +vllm_model\.model\.Lfm2MoeForCausalLM$", printed, re.MULTILINE)
    assert printed.count("\n  right; ") == 2, printed
    assert len(re.findall(r"[\d.]+ tokens/s", printed)) == 2


def test_openai_client(demo: tuple[str, str]):
    url, _ = demo
    printed = run(sys.executable, EXAMPLES / "openai_client.py", url)
    assert "chat: apple river star\n" in printed
    assert "streamed: apple river star\n" in printed
    assert "tool call: find_weather({'city': 'Paris'})" in printed


def test_offline():
    printed = run(sys.executable, EXAMPLES / "offline_vllm.py")
    assert printed.count("generate: ") == 2
    assert "chat: 'Repeat: apple river star' -> 'apple river star'" in printed
    assert "chat: 'What is park?' -> '88'" in printed


def test_run_batch(tmp_path: Path):
    printed = run(EXAMPLES / "run_batch.sh", "", tmp_path / "out.jsonl", cwd=tmp_path)
    for words in ("apple river star", "star moon fox", "queen snow garden"):
        assert f"{words.replace(' ', '-')} -> {words}\n" in printed
