"""What replacing the weights of a serving engine has to give, whatever the engine: the tokens of the new checkpoint.

An engine's suite has a fixture ``update`` that runs one engine of a checkpoint with steps: "generate", its ways of
updating ({"op": way, "folder": ...}, with "names" for a part), and "save", which leaves a sharded state in a folder.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.engine_common.adapters import TARGETS, adapter, clear
from tests.engine_common.checkpoint_files import named_tensors
from tests.engine_common.checkpoints import altered, checkpoint
from tests.engine_common.hf_reference import greedy
from tests.engine_common.references import NEW_TOKENS, Case, assert_same, cases
from tests.tolerances import CLEAR_MARGIN

COUNT = 60
UPDATES = 50
ASKED_AFTER = (1, 2, 3, UPDATES)
PARTS = (
    "model.layers.0.feed_forward.w1.weight",  # half of a merged matrix
    "model.layers.1.conv.conv.weight",
    "model.layers.1.conv.in_proj.weight",
    "model.layers.{attention}.self_attn.k_proj.weight",  # a part of another
    "model.layers.2.ffn_norm.weight",
    "model.layers.4.feed_forward.experts.3.w2.weight",
    "model.layers.4.feed_forward.experts.5.w1.weight",
)
ATTENTION = {"alpha": 2, "beta": 3}
"""A layer with attention, by model."""
Update = Callable[..., list]


def ask(model: str) -> dict:
    return {"prompts": [c.prompt for c in cases(model, COUNT)]}


def stacked(source: Path, target: Path) -> Path:
    """The checkpoint with the experts of a layer in two tensors, as transformers has them in memory."""

    def stack(tensors: dict[str, torch.Tensor]) -> None:
        experts = [name for name in tensors if ".experts." in name]
        layers = sorted({name.partition(".experts.")[0] for name in experts})
        for layer in layers:
            count = sum(
                n.startswith(f"{layer}.experts.") and n.endswith(".w2.weight") for n in experts
            )
            each = [
                {w: tensors.pop(f"{layer}.experts.{e}.{w}.weight") for w in ("w1", "w2", "w3")}
                for e in range(count)
            ]
            gate_up = [torch.cat([expert["w1"], expert["w3"]]) for expert in each]
            tensors[f"{layer}.experts.gate_up_proj"] = torch.stack(gate_up)
            tensors[f"{layer}.experts.down_proj"] = torch.stack([expert["w2"] for expert in each])

    return altered(source, target, stack)


def fifty_updates(
    update: Update,
    folders: tuple[Path, Path],
    model: str,
    ways: list[str],
    saved: Path | None,
    **engine,
) -> None:
    """To the other checkpoint and back again, each time in the next of the ``ways``; at the end the state may be saved.

    Prefixes of the old weights are in the prefix cache, and must not be found after an update.

    Args:
        folders: the weights of ``model`` and of its counterpart, under whichever names.
        saved: a folder for the sharded state, which an engine then is started from; None: it isn't saved.
    """
    names = (model, f"{model}_other")
    steps, asked = [ask(model)], [model]
    for count in range(1, UPDATES + 1):
        steps.append({"op": ways[count % len(ways)], "folder": str(folders[count % 2])})
        asked.append("")
        if count in ASKED_AFTER:
            steps.append(ask(names[count % 2]))
            asked.append(names[count % 2])
    if saved is not None:
        steps.append({"op": "save", "folder": str(saved)})
    results = update(checkpoint(model), steps, **engine)
    for step, name, result in zip(steps, asked, results, strict=False):
        if name:
            assert_same(result, cases(name, COUNT))
        else:
            assert result["success"], (step, result)
    if saved is not None:
        (again,) = update(saved, [ask(model)], load_format="sharded_state", **engine)
        assert_same(again, cases(model, COUNT))


def a_part(update: Update, folder: Path, model: str, ways: list[str], **engine) -> None:
    """Single tensors, parts of merged matrices and of experts among them: all the rest stays.

    Args:
        folder: takes the checkpoint that an engine with these tensors of the other one has.
    """
    other = checkpoint(f"{model}_other")
    names = [name.format(attention=ATTENTION[model]) for name in PARTS]

    def take(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= dict(named_tensors(str(other), names))

    mixed = altered(checkpoint(model), folder, take)
    prompts = [c.prompt for c in cases(model, COUNT)]
    pairs = zip(prompts, greedy(mixed, prompts, NEW_TOKENS), strict=True)
    asked = [Case(p, a) for p, a in pairs if min(a.margins) >= CLEAR_MARGIN]
    generate = {"prompts": [c.prompt for c in asked]}
    steps = [dict(generate)]
    for way in ways:
        steps += [
            {"op": way, "folder": str(other), "names": names},
            dict(generate),
            {"op": "from_disk", "folder": str(checkpoint(model))},
        ]
    results = update(checkpoint(model), steps, **engine)
    old = [out["tokens"] for out in results[0]]
    for index, way in enumerate(ways):
        done, outputs, back = results[1 + 3 * index : 4 + 3 * index]
        assert done["success"], (way, done)
        assert back["success"], (way, back)
        assert_same(outputs, asked)
    changed = [before != out["tokens"] for before, out in zip(old, outputs, strict=True)]
    assert sum(changed) > len(asked) / 2


def misnamed(folder: Path) -> tuple[Path, str]:
    """A checkpoint one of whose tensors, not the first, has a name that no model knows; and that name."""
    name, wrong = "model.layers.0.operator_norm.weight", "model.layers.0.operator_norm.wieght"

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors[wrong] = tensors.pop(name)

    return altered(checkpoint("alpha_other"), folder, rename), wrong


def beneath_adapters(update: Update, model: str, ways: list[str], **engine) -> None:
    """The model under an adapter becomes another one: both it and the two together answer as if made for each other."""
    other = f"{model}_other"
    (folder, _), (twin, merged) = (adapter(name, *TARGETS["all"]) for name in (model, other))
    assert same_factors(folder, twin)
    adapted = clear([c.prompt for c in cases(other, COUNT)], merged)
    assert len(adapted) > COUNT / 2
    with_it = {"prompts": [c.prompt for c in adapted], "lora": str(folder)}
    steps = [ask(model), dict(with_it)]
    for way in ways:
        steps += [{"op": way, "folder": str(checkpoint(other))}, ask(other), dict(with_it)]
        steps += [{"op": way, "folder": str(checkpoint(model))}, ask(model)]
    before, _, *results = update(checkpoint(model), steps, **engine)
    assert_same(before, cases(model, COUNT))
    for way in ways:
        done, plain, both, back, again = results[:5]
        del results[:5]
        assert done["success"], (way, done)
        assert back["success"], (way, back)
        assert_same(plain, cases(other, COUNT))
        assert_same(both, adapted)
        assert_same(again, cases(model, COUNT))


def same_factors(one: Path, two: Path) -> bool:
    """Whether two adapters' folders hold the same tensors."""
    pair = [load_file(folder / "adapter_model.safetensors") for folder in (one, two)]
    return pair[0].keys() == pair[1].keys() and all(
        torch.equal(pair[0][name], pair[1][name]) for name in pair[0]
    )
