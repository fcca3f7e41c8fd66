"""``LFM2_PLUGIN=on|off``: which model serves, read anew for every engine that a process starts.

A process may start one engine with our model and the next with the built-in one. An engine loads its plugins
once a process, so what registration leaves in the tables of vLLM is not a class but a choice: each entry below asks the
switch whenever vLLM asks the entry.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

SWITCH = "LFM2_PLUGIN"


class PluginError(RuntimeError):
    """The plugin can't do what it was installed for; the text says why and what to do."""


def switched_off() -> bool:
    """Whether the user asked for the engines' built-in model with ``LFM2_PLUGIN=off``.

    Raises:
        PluginError: the variable holds something else than ``on`` or ``off``.
    """
    value = os.environ.get(SWITCH, "on").strip().lower()
    if value not in ("on", "off", ""):
        raise PluginError(f"{SWITCH}={value!r} is not understood: set it to 'on' or 'off'")
    return value == "off"


class SwitchedModel:
    """An entry of vLLM's registry of models that stands for ours or for the built-in one.

    Args:
        choose: gives the entry that serves as the switch stands.
    """

    def __init__(self, choose: Callable[[], Any]) -> None:
        self._choose = choose

    @property
    def now(self) -> Any:
        """vLLM's own entry of the model that serves as the switch stands."""
        return self._choose()

    def inspect_model_cls(self) -> Any:
        return self.now.inspect_model_cls()

    def load_model_cls(self) -> type:
        model: type = self.now.load_model_cls()
        return model

    # vLLM keeps an entry's answers by the entry, so it is another one once the switch is turned.
    def __hash__(self) -> int:
        return hash(self.now)

    def __eq__(self, other: object) -> bool:
        return bool(self.now == getattr(other, "now", other))


class SwitchedOptions:
    """An entry of vLLM's table of what a model does to the options, ours or what the table had before.

    Args:
        choose: gives the entry that counts as the switch stands; None where there is none.
    """

    def __init__(self, choose: Callable[[], Any]) -> None:
        self._choose = choose

    @property
    def now(self) -> Any:
        """The class that counts as the switch stands; None where there is none."""
        return self._choose()

    def verify_and_update_model_config(self, model_config: Any) -> None:
        if entry := self.now:
            entry.verify_and_update_model_config(model_config)

    def verify_and_update_config(self, vllm_config: Any) -> None:
        if entry := self.now:
            entry.verify_and_update_config(vllm_config)
