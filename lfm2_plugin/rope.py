"""The rotary settings of a config, in any of the forms that transformers has written, checked.

Only the kinds of rotary embedding are read that both engines compute as transformers does. "dynamic" and "longrope" are
not among them: transformers chooses their frequencies anew by the length of each sequence, the engines once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config_values import is_number

DEFAULT_THETA = 1e6
KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""rope_type -> the settings that it needs."""
_YARN_MAY_HAVE = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_NAMES = ("rope_parameters", "rope_scaling")


def read_rope(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The rotary settings of a config's entries.

    transformers 4 wrote a flat rope_theta and rope_scaling, transformers 5 writes rope_parameters.

    Returns:
        The settings in the nested form, always with "rope_type" and "rope_theta", and what is wrong, in words. With
        anything wrong the settings mean nothing.
    """
    given = [name for name in _NAMES if values.get(name) not in (None, {})]
    for name in given:
        if not isinstance(values[name], Mapping):
            return {}, [f"{name} is {values[name]!r}, not a mapping"]
    if len(given) == 2 and _plain(values["rope_parameters"]) != _plain(values["rope_scaling"]):
        return {}, ["rope_parameters and rope_scaling differ; leave one out"]
    rope = _plain(values[given[0]]) if given else {}
    inner = sorted(str(name) for name, value in rope.items() if isinstance(value, Mapping))
    if inner:
        return {}, [
            f"{given[0]} has settings for kinds of layers ({', '.join(inner)}), and LFM2-MoE has one rotary embedding: "
            "put rope_type and rope_theta beside each other, without these names"
        ]
    kind = rope.pop("rope_type", "default")
    theta = rope.pop("rope_theta", values.get("rope_theta"))
    theta = DEFAULT_THETA if theta is None else theta
    problems = []
    if not is_number(theta) or theta <= 0:
        problems.append(f"rope_theta is {theta!r}, not a number above 0")
        theta = DEFAULT_THETA
    problems += _problems(kind, rope)
    return {"rope_type": kind, "rope_theta": float(theta), **rope}, problems


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say something, the kind under its newer name."""
    rope = {name: value for name, value in given.items() if value is not None}
    kind = rope.pop("type", None)
    if kind is not None:
        rope.setdefault("rope_type", kind)
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    return rope


def _problems(kind: Any, rope: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings of one kind, rope_type and rope_theta aside."""
    if not isinstance(kind, str) or kind not in KINDS:
        return [
            f"rope_type is {kind!r}; the kinds that vLLM, SGLang and transformers compute alike are {', '.join(KINDS)}"
        ]
    may_have = {*KINDS[kind], *(_YARN_MAY_HAVE if kind == "yarn" else ())}
    problems = [
        f"rope_type {kind!r} needs {name}, which is not there"
        for name in KINDS[kind]
        if name not in rope
    ]
    for name, value in rope.items():
        if name == "truncate" and kind == "yarn":
            if not isinstance(value, bool):
                problems.append(f"{name} of the rotary settings is {value!r}, not true or false")
        elif name not in may_have:
            problems.append(
                f"the rotary settings have {name} = {value!r}, which rope_type {kind!r} has no use for"
            )
        elif not is_number(value) or value <= 0:
            problems.append(f"{name} of the rotary settings is {value!r}, not a number above 0")
    return problems or _contradictions(rope)


def _contradictions(rope: Mapping[str, Any]) -> list[str]:
    """What doesn't fit together in settings that are numbers all."""
    problems = []
    if rope.get("factor", 1) < 1:
        problems.append(f"factor of the rotary settings is {rope['factor']}, below 1")
    if rope.get("low_freq_factor", 1) >= rope.get("high_freq_factor", 4):
        problems.append("low_freq_factor of the rotary settings is not below high_freq_factor")
    if rope.get("beta_slow", 1) >= rope.get("beta_fast", 32):
        problems.append("beta_slow of the rotary settings is not below beta_fast")
    if ("mscale" in rope) != ("mscale_all_dim" in rope):
        problems.append("the rotary settings have one of mscale and mscale_all_dim; it takes both")
    if "mscale" in rope and "attention_factor" in rope:
        problems.append("the rotary settings have attention_factor and mscale; leave one out")
    return problems
