"""Three CPU devices for every test in this process, so that sharding over sub-models is really exercised."""

import os
import sys
import tempfile
from pathlib import Path

# Whole runs compile the same programs again and again; this process and those that it starts share what is compiled.
# Always a new folder: no test sees what an earlier suite, or a user's run, has left.
COMPILED = tempfile.TemporaryDirectory(prefix="llb-compiled-", ignore_cleanup_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
# and quickly: most of the suite's time is XLA optimising programs that then run for milliseconds
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax  # noqa: E402 (reads the variable)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 3)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the three scripts, also when only `pytest` is typed
