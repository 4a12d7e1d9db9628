"""Which environment variables reward code sees: an allow-list, and what it names itself.

A name does not tell what holds a secret (DATABASE_URL, GH_PAT, PIP_INDEX_URL), so what is not known
to be harmless stays out.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

# Where programs, libraries, caches and temporary files are; language; processes and threads.
NAMES = frozenset(
    """
    PATH HOME USER LOGNAME SHELL PWD HOSTNAME TERM LANG LANGUAGE TZ TMPDIR TMP TEMP
    XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME XDG_RUNTIME_DIR
    VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV
    LD_LIBRARY_PATH LD_PRELOAD LIBRARY_PATH CPATH GLIBC_TUNABLES JAVA_HOME
    SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
    HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy
    HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE HF_DATASETS_CACHE HF_DATASETS_OFFLINE HF_ENDPOINT
    HUGGINGFACE_HUB_CACHE TRANSFORMERS_CACHE TRANSFORMERS_OFFLINE NLTK_DATA
    TOKENIZERS_PARALLELISM RAYON_NUM_THREADS NUMEXPR_NUM_THREADS NUMEXPR_MAX_THREADS
    OPENBLAS_NUM_THREADS VECLIB_MAXIMUM_THREADS TORCH_HOME TORCH_EXTENSIONS_DIR
    CUDA_HOME CUDA_PATH CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER NVIDIA_VISIBLE_DEVICES
    NVIDIA_DRIVER_CAPABILITIES ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES
    """.split()  # noqa: SIM905
)
PREFIXES = ("LC_", "PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "COHORT_")
# For names under a prefix: PYTHON_API_TOKEN is not one that Python reads.
SECRET = re.compile(r"TOKEN|SECRET|KEY|PASSW|CREDENTIAL|_PAT$", re.IGNORECASE)
# A user or a password in an address, as in http://me:word@proxy.
USER_IN_ADDRESS = re.compile(r"://[^/\s]*@")


def is_shown(name: str, value: str, allowed: Collection[str] = ()) -> bool:
    """Whether reward code may see a variable.

    Args:
        name: Of the variable.
        value: Its value; an address with a user or password in it is hidden.
        allowed: Names that the reward functions list as secrets.
    """
    if name in allowed:
        return True
    known = name in NAMES or (name.startswith(PREFIXES) and not SECRET.search(name))
    return known and not USER_IN_ADDRESS.search(value)


def scrubbed_environment(
    environment: Mapping[str, str], allowed: Collection[str] = ()
) -> dict[str, str]:
    """The variables that reward code may see.

    Args:
        environment: All variables.
        allowed: Names that the reward functions list as secrets.
    """
    return {name: value for name, value in environment.items() if is_shown(name, value, allowed)}


def hide_environment(allowed: Collection[str] = ()) -> None:
    """Blank, in this process's own memory, the variables that reward code may not see.

    The kernel shows the environment that a process was started with to every process of the same
    user, in /proc/PID/environ. `os.environ` and what this process starts are not changed. Variables
    of other processes of this user (Ray's own) are not touched: only another user or a container
    keeps those apart.

    Args:
        allowed: Names that the reward functions list as secrets.
    """
    stat = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
    fields = stat.rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])  # env_start and env_end of proc(5)
    if not 0 < start < end:
        return
    block = ctypes.string_at(start, end - start)
    for entry in re.finditer(rb"([^\0=]+)=([^\0]+)", block):
        name, value = os.fsdecode(entry[1]), os.fsdecode(entry[2])
        if is_shown(name, value, allowed):
            continue
        if name in os.environ:
            # A copy for the C library, which may still read it from the block.
            os.putenv(name, os.environ[name])
        ctypes.memset(start + entry.start(2), 0, len(entry[2]))
