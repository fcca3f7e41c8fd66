"""The demo model: a small LFM2-MoE trained from scratch on tasks with known answers.

``model_path()`` is its folder (it loads with ``AutoModelForCausalLM.from_pretrained`` and ``vllm serve``),
:mod:`lfm2_plugin.demo.tasks` makes held-out questions and checks the answers, and ``README.md`` beside this file is the
model card.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """The folder of the demo model.

    Raises:
        FileNotFoundError: the installed package lacks the model's files.
    """
    folder = Path(__file__).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the demo model is missing: no model.safetensors in {folder}. Reinstall lfm2-plugin, or train the model "
            "again with `python examples/train_demo_model.py` from a clone."
        )
    return folder
