"""Write the file tree of README.md from the first lines of the files' docstrings: ``make tree``."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- tree: made by `make tree` -->", "<!-- end of tree -->"
FOLDERS = ("lfm2_plugin", "vllm_model", "sglang_model", "tests", "benchmarks", "examples", "tools")
PLAIN = {
    "setup.py": "all metadata of the distribution: packages, extras, entry points",
    "pyproject.toml": "configuration of ruff, mypy and pytest",
    "Makefile": "every command; `make help` lists them",
    ".ci/run": "what CI runs: make lint, make test",
    "CONTRIBUTING.md": "the rules of the house, and how to run things",
    "docs/architecture.md": "the way of one step",
    "docs/checkpoints.md": "which checkpoints are served and refused, and where something from outside is read",
    "docs/contracts.md": "engine field -> ConvBatch field",
    "docs/memory.md": "the table of cache memory, from vLLM's own planner",
    "docs/quantised-checkpoints.md": "what llm-compressor writes, and how each method's lists are read",
    "docs/kv-connectors.md": "KV connectors, offloading and routed experts: what was tried",
    "docs/porting.md": "how to come to a new vLLM",
    "docs/gpu-verification.md": "what has run on a GPU, and what has to",
    "docs/decisions/": "one page for each choice that a reader would question",
    "lfm2_plugin/demo/model/": "the demo model: weights, tokenizer, chat template, card",
    "examples/run_batch.sh": "offline batches in OpenAI's file format",
}
WIDTH = 42  # columns of the names


def tracked() -> list[str]:
    """The Python files of the folders shown, tracked or about to be, in the order of the tree."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted({name for name in found.splitlines() if name.endswith(".py")})


def first_line(path: str) -> str:
    """The first sentence of a file's docstring, on one line."""
    text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    line = " ".join(text.split("\n\n")[0].split())
    for end in (". ", ": ``pytest", ": ``python"):
        line = line.split(end)[0]
    return line.rstrip(".").replace("``", "`")


def tree() -> str:
    """The block of README.md, markers and fence included."""
    lines = [f"{name:{WIDTH}} {text}" for name, text in PLAIN.items()]
    for folder in FOLDERS:
        names = [name for name in tracked() if name.startswith(f"{folder}/")]
        shown = {name: first_line(name) for name in names}
        lines += [
            "",
            *(f"{n:{WIDTH}} {t}".rstrip() for n, t in shown.items() if t or "__init__" not in n),
        ]
    return "\n".join([START, "```", *lines, "```", END])


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(before + tree() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
