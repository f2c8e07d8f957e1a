"""Lines for the person who runs a script: one for each stage, a progress bar, one when something is wrong.

Of several processes (llb.processes) only process 0 prints.
"""

import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterable

from tqdm import tqdm

from llb.files import UserError, is_writer


def say(text: str) -> None:
    """Print one line on standard output at once, so that a redirected log keeps its order."""
    if is_writer():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def progress(iterable: Iterable | None = None, **settings) -> tqdm:
    """A bar with rate and time left on standard error; redirected to a file, a line every half minute at most."""
    settings["disable"] = not is_writer()
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, leave=False, **settings)
    return tqdm(iterable, ascii=True, ncols=100, leave=False, mininterval=30, delay=15, **settings)


def run_script(main: Callable[[], None], resumable: bool = True) -> None:
    """Run a script's main. Bad input ends with one line and status 2, Ctrl-C with one line and status 130.

    resumable: whether the same command continues an interrupted run.
    """
    for stream in (sys.stdout, sys.stderr):
        # the old code page of a Windows console has no "→" or "×": print a substitute instead of failing
        stream.reconfigure(errors="replace")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        jax = sys.modules.get("jax")
        if jax is not None and jax.distributed.is_initialized():
            os._exit(2)  # sys.exit would wait for the other processes to end
        sys.exit(2)
    except KeyboardInterrupt as stop:
        # the end below skips clean-up, so release now what the interrupted calls hold: worker processes' semaphores
        traceback.clear_frames(stop.__traceback__)
        gc.collect()
        line = "\ninterrupted"
        if resumable:
            without = ", without --overwrite," if "--overwrite" in sys.argv else ""
            line += f": the same command{without} continues from here"
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # JAX's threads still work and can crash an interpreter that sys.exit takes down
