"""Weights that are replaced while an engine serves: the tokens are those of the new checkpoint, then the old."""

import pytest

from tests.engine_common.checkpoints import altered, checkpoint
from tests.engine_common.hf_reference import greedy
from tests.engine_common.references import NEW_TOKENS, Case, assert_same, cases
from tests.tiers import matrix
from tests.tolerances import CLEAR_MARGIN

pytestmark = pytest.mark.engine

COUNT = 60


def ask(model: str) -> dict:
    return {"prompts": [c.prompt for c in cases(model, COUNT)]}


@pytest.fixture
def update(server):
    """Runs one engine of the named checkpoint with steps of ``weight_jobs``."""

    def start(model: str, steps: list[dict], **engine) -> list:
        folder = str(checkpoint(model))
        engine = {"dtype": "float32", **engine}
        job = "weight_jobs:run_engine"
        return server.run(
            job,
            model=folder,
            engine=engine,
            steps=steps,
            env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
        ).get()["steps"]

    return start


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("alpha", {}),
        matrix("beta", {}),
        matrix("beta", {"tp_size": 2}),
        matrix("alpha", {"disable_radix_cache": True}),
    ],
)
@pytest.mark.parametrize("way", ["from_disk", "from_tensors"])
def test_the_other_checkpoint_and_back(update, model, options, way):
    """Prefixes of the old weights are in the radix cache, and must not be found after the update."""
    other = f"{model}_other"
    there = {"op": way, "folder": str(checkpoint(other))}
    back = {"op": way, "folder": str(checkpoint(model))}
    steps = [ask(model), there, ask(other), ask(model), back, ask(model), ask(other)]
    result = update(model, steps, **options)
    assert_same(result[0], cases(model, COUNT))
    assert result[1]["success"], result[1]
    assert_same(result[2], cases(other, COUNT))
    assert result[4]["success"], result[4]
    assert_same(result[5], cases(model, COUNT))
    old = [out["tokens"] for out in result[0]]
    assert sum(a != b["tokens"] for a, b in zip(old, result[3], strict=True)) > COUNT * 0.9


@pytest.mark.parametrize("model", ["alpha", matrix("beta")])
def test_a_part_of_the_weights(update, tmp_path, model):
    """A convolution, a projection, an expert and a norm: the rest stays, packed matrices too."""
    names = [
        "model.layers.1.conv.conv.weight",
        "model.layers.1.conv.in_proj.weight",
        "model.layers.4.feed_forward.experts.3.w2.weight",
        "model.layers.4.feed_forward.experts.5.w1.weight",
        "model.layers.2.ffn_norm.weight",
    ]
    other = checkpoint(f"{model}_other")

    def take(tensors: dict) -> None:
        from safetensors.torch import load_file

        (file,) = other.glob("*.safetensors")
        tensors |= {name: tensor for name, tensor in load_file(file).items() if name in names}

    mixed = altered(checkpoint(model), tmp_path / "mixed", take)
    prompts = [c.prompt for c in cases(model, COUNT)]
    pairs = zip(prompts, greedy(mixed, prompts, NEW_TOKENS), strict=True)
    asked = [Case(p, a) for p, a in pairs if min(a.margins) >= CLEAR_MARGIN]
    step = {"prompts": [c.prompt for c in asked]}
    result = update(
        model, [step, {"op": "from_tensors", "folder": str(other), "names": names}, step]
    )
    assert result[1]["success"], result[1]
    assert_same(result[2], asked)
    changed = [a["tokens"] != b["tokens"] for a, b in zip(result[0], result[2], strict=True)]
    assert sum(changed) > len(asked) / 2


@pytest.mark.parametrize("way", ["from_disk", "from_tensors"])
def test_weights_that_do_not_fit_end_the_engine(server, tmp_path, way):
    """Better no answers than those of half an update, and SGLang knows no way back: none for tensors,
    and for files one that reads the new checkpoint again."""
    name, wrong = "model.layers.0.operator_norm.weight", "model.layers.0.operator_norm.wieght"

    def rename(tensors: dict) -> None:
        tensors[wrong] = tensors.pop(name)

    folder = altered(checkpoint("alpha_other"), tmp_path / "wrong", rename)
    outcome = server.run(
        "weight_jobs:run_engine",
        model=str(checkpoint("alpha")),
        engine={"dtype": "float32"},
        steps=[{"op": way, "folder": str(folder)}],
    )
    assert outcome.error is not None
    assert f"1 unexpected: {wrong}" in outcome.log
