"""The machine code of the kernels: a fatbin that was built beside their sources, or what NVRTC makes of these.

native/engine/cuda/kernels.fatbin, kernels.sha256     built by `make kernels`; used while the sources are those
$FASTNNUNET_CACHE_HOME/cuda/KEY.cubin                 compiled here, for one architecture
"""

import hashlib
import importlib
import logging
from pathlib import Path
from typing import Any

from fastnnunet.errors import BackendError, FastnnUNetError
from fastnnunet.specs.canonical import sha256_of, sha256_of_file
from fastnnunet.specs.home import local_home
from fastnnunet.system.files import atomic_output, make_folder

log = logging.getLogger(__name__)

SOURCES = Path(__file__).resolve().parents[2] / "native" / "engine" / "cuda"
FATBIN, DIGESTS = "kernels.fatbin", "kernels.sha256"
OPTIONS = ("--std=c++17", "--fmad=false")  # no contraction: results are those of the core
_MEND = "install it: pip install nvidia-cuda-nvrtc (for CUDA 12: nvidia-cuda-nvrtc-cu12)"


def source_files() -> list[Path]:
    """kernels.cu and its headers."""
    return sorted([*SOURCES.glob("*.hpp"), *SOURCES.glob("*.cu")])


def kernel_code(architecture: str) -> bytes:
    """A fatbin, cubin or PTX for an architecture such as sm86. Raises BackendError when there is none and no NVRTC."""
    if (fatbin := _built()) is not None:
        return fatbin
    nvrtc = _import_nvrtc()
    version = _check(nvrtc, nvrtc.nvrtcVersion())
    digests = {file.name: sha256_of_file(file) for file in source_files()}
    key = sha256_of({"sources": digests, "options": OPTIONS, "nvrtc": list(version), "architecture": architecture})
    kept = local_home() / "cuda" / f"{key[:32]}.cubin"
    if (code := _read(kept)) is not None:
        return code
    code = compile_kernels(architecture)
    _keep(code, kept)
    return code


def compile_kernels(architecture: str) -> bytes:
    """What NVRTC makes of the sources: machine code, or PTX where it does not know an architecture this new.

    Raises BackendError without NVRTC, or when the sources do not compile.
    """
    nvrtc = _import_nvrtc()
    known = [int(arch) for arch in _check(nvrtc, nvrtc.nvrtcGetSupportedArchs())]
    number = int(architecture.removeprefix("sm"))
    fitting = [arch for arch in known if arch <= number]
    if not fitting:
        raise BackendError(f"the GPU is of architecture {architecture}, NVRTC compiles for sm{min(known)} and later")
    is_known = number in known
    target = f"--gpu-architecture={'sm' if is_known else 'compute'}_{number if is_known else max(fitting)}"
    headers = [file for file in source_files() if file.suffix == ".hpp"]
    program = _check(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            (SOURCES / "kernels.cu").read_bytes(),
            b"kernels.cu",
            len(headers),
            [file.read_bytes() for file in headers],
            [file.name.encode() for file in headers],
        ),
    )
    options = [option.encode() for option in (*OPTIONS, target)]
    error, *_ = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        text = bytes(_check(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, text)
        raise BackendError(f"the CUDA kernels do not compile for {architecture}: {text.decode(errors='replace')}")
    what = "CUBIN" if is_known else "PTX"
    code = bytes(_check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program)))
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code


def _built() -> bytes | None:
    """The fatbin beside the sources, if it was built of them as they are."""
    file, digests = SOURCES / FATBIN, SOURCES / DIGESTS
    if not (file.is_file() and digests.is_file()):
        return None
    named = {Path(name).name: digest for digest, name in (line.split() for line in digests.read_text().splitlines())}
    if named != {source.name: sha256_of_file(source) for source in source_files()}:
        log.warning("%s is of other sources than those beside it and is not used; make kernels builds it again", file)
        return None
    return file.read_bytes()


def _read(path: Path) -> bytes | None:
    """None where there is no whole file."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _keep(code: bytes, path: Path) -> None:
    try:
        make_folder(path.parent)
        with atomic_output(path) as partial:
            partial.write_bytes(hashlib.sha256(code).digest() + code)
    except (FastnnUNetError, OSError) as e:
        log.debug("%s cannot be kept: %s", path, e)


def _import_nvrtc() -> Any:
    """cuda.bindings.nvrtc with its library. Raises BackendError where one is missing."""
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as e:  # cuda-python looks for the library at the first call
        raise BackendError(f"the CUDA kernels have to be compiled, and NVRTC is missing: {e}\n{_MEND}") from e
    return nvrtc


def _check(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    error, *values = result
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"NVRTC failed: {error.name}")
    return values[0] if len(values) == 1 else tuple(values)
