"""What a person sees while a script runs: one line per stage, a progress bar, one line when something is wrong."""

import ctypes
import gc
import importlib.util
import logging
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
from tqdm import tqdm

from llb import processes
from llb.files import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def say(text: str) -> None:
    """One line on standard output, at once (a redirected log keeps its order); of several processes one speaks."""
    if not processes.first():
        return
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def progress(iterable: Iterable | None = None, **settings) -> tqdm:
    """A bar with rate and time left on standard error; redirected to a file, a line every half minute at most."""
    settings["disable"] = not processes.first()
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, leave=False, **settings)
    return tqdm(iterable, ascii=True, ncols=100, leave=False, mininterval=30, delay=15, **settings)


def choose_device(settings=None) -> str:
    """Start JAX on the accelerator there is, else on the CPU without a plug-in's traceback; returns a line about it.

    settings: those of a script that several processes may run together, see `llb.processes.join`.

    jax[cuda12] installs its plug-in on every Linux machine. Without NVIDIA's driver the plug-in fails loudly at first
    use, so look for the driver first.
    """
    # orbax and absl announce every save at this level
    logging.getLogger("absl").setLevel(logging.ERROR)
    keep_compiled()
    no_driver = False
    if "JAX_PLATFORMS" not in os.environ and importlib.util.find_spec("jax_cuda12_plugin"):
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            jax.config.update("jax_platforms", "cpu")
            no_driver = True
    # without any plug-in, which all lie in jax_plugins, there is only the CPU
    if jax.config.jax_platforms == "cpu" or not (jax.config.jax_platforms or importlib.util.find_spec("jax_plugins")):
        keep_memory()
    if settings is not None:
        processes.join(settings)
    try:
        devices = jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: no such device ({reason})") from None
    if devices[0].platform != "cpu" and "JAX_DEFAULT_MATMUL_PRECISION" not in os.environ:
        # left alone, JAX lets an NVIDIA GPU round float32 operands to TF32's 10 bits; what is meant to be rounded
        # (--precision bfloat16) is so before it is multiplied
        jax.config.update("jax_default_matmul_precision", "highest")
    together = f", in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    if devices[0].platform == "cpu":
        line = "device: CPU" + (f", seen as {len(devices)} devices" if len(devices) > 1 else "")
        return line + (" (no NVIDIA driver found)" if no_driver else "") + together
    return f"device: {len(devices)} × {devices[0].device_kind}{together}"


def keep_compiled() -> None:
    """Compiled programs outlive the process: the next start reads them in place of compiling for a minute.

    They lie in JAX_COMPILATION_CACHE_DIR, by default in the user's cache folder. JAX names them by program, version and
    processor, so a stale one is never read. Where the folder cannot be written, everything is compiled anew.
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
    """Let the C library keep freed memory, so that XLA's buffers on a CPU are not fetched anew at every step.

    glibc by default hands every large block back to the kernel and gets it again page by page: a million page faults,
    a fifth of the time, in a step of three sub-models at 392 pixels. It takes all three settings (mallopt(3)): no block
    with a mapping of its own, no trimming, and one arena, since the others are mappings too. They hold for threads that
    start later, so this comes before JAX starts its own. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
        mallopt(parameter, value)


def run(main: Callable[[], None], goes_on: bool = True) -> None:
    """Run a script's main: bad input ends with status 2 and one line, Ctrl-C with 130 and one line.

    goes_on: whether the same command goes on from where it was interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        # a Windows console's old code page has no "→" or "×"; better a substitute than a crash
        stream.reconfigure(errors="replace")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if jax.distributed.is_initialized():
            sys.stdout.flush()
            os._exit(2)  # not sys.exit: this process would wait for the others to end as well
        sys.exit(2)
    except KeyboardInterrupt as stop:
        # what the interrupted calls held is let go of now, since the end below does not: worker processes' semaphores
        traceback.clear_frames(stop.__traceback__)
        gc.collect()
        same = "the same command" + (", without --overwrite," if "--overwrite" in sys.argv else "")
        print("\ninterrupted" + f": {same} goes on from here" * goes_on, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # not sys.exit: JAX's threads, still at work, can crash an interpreter that takes itself apart
