"""Start JAX: which device, how many processes, where compiled programs and freed memory are kept."""

import ctypes
import importlib.util
import logging
import os
import platform
import sys
from pathlib import Path

import jax

from llb import processes
from llb.files import UserError

MATMUL = "JAX_DEFAULT_MATMUL_PRECISION"  # a variable that changes results, where it is set
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def start_jax(settings=None) -> str:
    """Start JAX on the accelerator, or on the CPU if there is none, and return a line that names the device.

    settings: Stage1 or Stage2, which several processes may run together, see `llb.processes.join`; None or Evaluate for
        a script that one process runs. A UserError is raised if they do not fit, or JAX_PLATFORMS names no device.
    """
    silence_checkpoints()
    jax.config.update("jax_enable_x64", False)  # else a variable of the shell would change every score
    jax.config.update("jax_enable_preemption_service", False)  # of several processes: it takes SIGTERM for itself
    keep_compiled()
    no_driver = use_cpu_without_driver()
    # all plug-ins lie in jax_plugins: without any there is only the CPU
    if jax.config.jax_platforms == "cpu" or not (jax.config.jax_platforms or importlib.util.find_spec("jax_plugins")):
        keep_memory()
    processes.join(settings)
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or "its driver does not start"
        raise UserError(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: no such device ({reason})") from None
    together = f", in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    together += f", {MATMUL}={os.environ[MATMUL]}" if MATMUL in os.environ else ""
    if devices[0].platform == "cpu":
        several = f", seen as {len(devices)} devices" if len(devices) > 1 else ""
        return "device: CPU" + several + (" (no NVIDIA driver found)" if no_driver else "") + together
    if MATMUL not in os.environ:  # by default an NVIDIA GPU rounds float32 to TF32's 10 bits
        jax.config.update("jax_default_matmul_precision", "highest")
    return f"device: {len(devices)} × {devices[0].device_kind}{together}"


def silence_checkpoints() -> None:
    """Orbax announces every checkpoint, and gives a traceback for each of its threads that fails; llb.checkpoint says
    the same in one line. TensorStore complains of each further array of a damaged checkpoint."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def hook(ignored) -> None:
        if str(ignored.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(ignored)

    sys.unraisablehook = hook


def use_cpu_without_driver() -> bool:
    """Keep JAX's CUDA plug-in silent on a machine without an NVIDIA driver; returns whether that was necessary.

    jax[cuda12] installs the plug-in on every Linux machine. Without a driver it prints a traceback at JAX's first use.
    """
    if "JAX_PLATFORMS" in os.environ or jax.config.jax_platforms or not importlib.util.find_spec("jax_cuda12_plugin"):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        jax.config.update("jax_platforms", "cpu")
        return True
    return False


def default_precision() -> str:
    """What the operands of matrix products are rounded to by default: "float32" on the CPU, else "bfloat16"."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def keep_compiled() -> None:
    """Keep compiled programs on the disk: the next start reads them, which saves up to a minute of compiling.

    They lie in JAX_COMPILATION_CACHE_DIR, by default in the user's cache folder. If it cannot be written, every start
    compiles. JAX names them by program, version and processor, so it never reads a stale one.
    """
    if jax.config.jax_compilation_cache_dir is None:  # JAX has read the variable by itself
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llb" / "jax"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # read-only; no home
            return
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # JAX's 1 s leaves out a third


def keep_memory() -> None:
    """Let the C library keep freed memory, so that XLA's buffers on a CPU do not come from the kernel at every step.

    By default glibc returns large blocks and gets them back page by page: a fifth of the time of a step of three
    sub-models at 392 pixels. It takes all three settings (mallopt(3)): no block with a mapping of its own, no trimming,
    and one arena, since the others are mappings too. They hold for threads that start later: this comes before JAX's.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
        mallopt(parameter, value)
