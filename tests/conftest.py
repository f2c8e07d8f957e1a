"""Three CPU devices for every test in this process, so that sharding over sub-models is really exercised."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 3)
