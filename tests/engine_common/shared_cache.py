"""Files and folders made once for all tests, by whichever process comes first; the others wait for it."""

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def made_once(path: Path, make: Callable[[Path], Any]) -> Path:
    """``path``, made by ``make(another path)`` when it is absent; never seen half made.

    Args:
        path: a file or folder; its name has to say all that its content depends on.
        make: writes a file or folder at the path that it is given.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_name(f"{path.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.unlink(missing_ok=True)
            make(partial)
            partial.rename(path)
    return path


def computed_once(path: Path, compute: Callable[[], Any]) -> Any:
    """The plain value that ``compute`` gave when it was first called for ``path``, kept there as JSON."""

    def write(partial: Path) -> None:
        partial.write_text(json.dumps(compute(), separators=(",", ":")))

    return json.loads(made_once(path, write).read_text())
