"""The rotary settings of a config: every form that transformers wrote is read, whatever else is refused in words."""

from __future__ import annotations

from typing import Any

import pytest

from lfm2_plugin.rope import read_rope

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
GOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {"rope_type": "default", "rope_theta": 1e6}),
    "empty": ({"rope_parameters": {}}, {"rope_type": "default", "rope_theta": 1e6}),
    "flat": ({"rope_theta": 10_000}, {"rope_type": "default", "rope_theta": 1e4}),
    "both, by SGLang": (
        {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default", "type": "default"}},
        {"rope_type": "default", "rope_theta": 5e6},
    ),
    "written twice": (
        {"rope_parameters": YARN, "rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 2e6},
        {**YARN, "rope_theta": 2e6},
    ),
    "no part left out": (
        {"rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 1.0}},
        {"rope_type": "default", "rope_theta": 5e6},
    ),
    "null": (
        {"rope_parameters": {"rope_theta": None, "rope_type": None, "factor": None}},
        {"rope_type": "default", "rope_theta": 1e6},
    ),
    "yarn": (
        {"rope_parameters": {**YARN, "beta_fast": 16, "truncate": False}},
        {**YARN, "beta_fast": 16, "truncate": False, "rope_theta": 1e6},
    ),
    "llama3": ({"rope_scaling": LLAMA3}, {**LLAMA3, "rope_theta": 1e6}),
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a list": ({"rope_parameters": [1e6]}, "rope_parameters is [1000000.0], not a mapping"),
    "an empty list": ({"rope_parameters": []}, "rope_parameters is [], not a mapping"),
    "a number": ({"rope_scaling": 2.0}, "rope_scaling is 2.0, not a mapping"),
    "per kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 5e6}}},
        "settings for kinds of layers (full_attention)",
    ),
    "theta 0": ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
    "flat theta 0": ({"rope_theta": 0.0}, "rope_theta is 0.0"),
    "negative theta": ({"rope_theta": -1e6}, "rope_theta is -1000000.0"),
    "theta NaN": ({"rope_theta": float("nan")}, "rope_theta is nan"),
    "theta infinite": ({"rope_theta": float("inf")}, "rope_theta is inf"),
    "theta in words": ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta is '1e6'"),
    "theta true": ({"rope_theta": True}, "rope_theta is True"),
    "two that differ": (
        {"rope_parameters": YARN, "rope_scaling": {**YARN, "factor": 2.0}},
        "rope_parameters and rope_scaling differ",
    ),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
    "no name": ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type is ['yarn']"),
    "no factor": ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs factor"),
    "no original length": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
        "'yarn' needs original_max_position_embeddings",
    ),
    "factor in words": (
        {"rope_parameters": {"rope_type": "linear", "factor": "2"}},
        "factor of the rotary settings is '2'",
    ),
    "factor below 1": ({"rope_parameters": {**YARN, "factor": 0.5}}, "is 0.5, below 1"),
    "sections": (
        {"rope_parameters": {"rope_theta": 1e6, "mrope_section": [8, 12, 12]}},
        "mrope_section = [8, 12, 12], which rope_type 'default' has no use for",
    ),
    "a part of the head": (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5",
    ),
    "half a scale": ({"rope_parameters": {**YARN, "mscale": 1.0}}, "one of mscale and"),
    "two scales": (
        {"rope_parameters": {**YARN, "mscale": 1, "mscale_all_dim": 1, "attention_factor": 1}},
        "attention_factor and mscale",
    ),
    "crossed": ({"rope_parameters": {**LLAMA3, "low_freq_factor": 8}}, "not below high_freq"),
    "crossed betas": ({"rope_parameters": {**YARN, "beta_slow": 64}}, "not below beta_fast"),
    "truncate": ({"rope_parameters": {**YARN, "truncate": "no"}}, "truncate of the rotary"),
}


@pytest.mark.parametrize("name", GOOD)
def test_read(name: str) -> None:
    given, expected = GOOD[name]
    assert read_rope(given) == (expected, [])


@pytest.mark.parametrize("name", BAD)
def test_refused_in_words(name: str) -> None:
    given, words = BAD[name]
    _, problems = read_rope(given)
    assert any(words in problem for problem in problems), problems
