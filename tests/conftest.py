"""Three CPU devices for every test in this process, so that sharding over sub-models is really exercised."""

import sys
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 3)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the three scripts, also when only `pytest` is typed
