"""Which device trains which sub-model.

The devices form a mesh with one axis, "model". Each device holds the same number of rows of the stack, and each row is
one sub-model. The sub-models never exchange anything, so training needs no communication: `on_own_rows` sees to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from llb.features import Fetch
from llb.processes import gathered


@dataclass(frozen=True)
class Placement:
    """Where the K sub-models are. Any K fits any number of devices: the stack has R ≥ K rows, the same on each device,
    and the rows after the first K repeat sub-models 0, 1, …; their results are dropped."""

    model_of_row: np.ndarray  # int (R,): the sub-model in each row
    mesh: jax.sharding.Mesh

    @property
    def sharding(self) -> jax.NamedSharding:
        """Of every array with a leading axis R."""
        return jax.NamedSharding(self.mesh, jax.P("model"))

    def spread(self, tree):
        """A host tree with leading axis K → on the devices, with leading axis R."""

        def one(leaf) -> jax.Array:
            leaf = np.asarray(leaf)[self.model_of_row]
            return jax.make_array_from_callback(leaf.shape, self.sharding, leaf.__getitem__)

        return jax.tree.map(one, tree)

    def spread_keys(self, keys: jax.Array) -> jax.Array:
        """(K,) random keys → (R,) on the devices."""
        return jax.random.wrap_key_data(self.spread(jax.random.key_data(keys)))

    def spread_features(self, fetch: Fetch, indices: np.ndarray, feature_shape: tuple[int, ...]) -> jax.Array:
        """Image indices, int (K, B) → their features (R, B, *feature_shape), each sub-model's on its device.

        A process fetches only what its own devices need. feature_shape: of one image.
        """
        indices = indices[self.model_of_row]
        shape = (*indices.shape, *feature_shape)
        return jax.make_array_from_callback(shape, self.sharding, lambda where: fetch(indices[where[0]]))

    def copied(self, tree):
        """A host tree → the same on every device; None stays None."""
        return jax.device_put(tree, jax.NamedSharding(self.mesh, jax.P()))

    def gather(self, tree, submodels: int):
        """The reverse of `spread`: a host tree with leading axis K, in all processes."""
        return jax.tree.map(lambda leaf: leaf[:submodels], gathered(tree))

    def local_values(self, values: jax.Array) -> dict[int, np.ndarray]:
        """Values (R, …) → the rows that this process's devices hold, by sub-model."""
        local = {}
        for shard in values.addressable_shards:
            local.update(zip(self.model_of_row[shard.index[0]].tolist(), np.asarray(shard.data)))
        return local


def on_own_rows(function: Callable, mesh: jax.sharding.Mesh, stacks: int, shared: int = 0) -> Callable:
    """The same function, in which each device works on its own rows of the stack.

    XLA alone does not see that rows are independent: it gathers those of all devices to sort each (hard mining). That
    costs time on accelerators. On CPU devices it can wait for ever: a device that has come holds a thread of the pool,
    and a program that encodes the next batch needs threads of the same pool (see `llb.features.encoding_devices`).

    function: of `stacks` trees (R, …), then `shared` trees that all devices have; it gives trees (R, …).
    """
    specs = (jax.P("model"),) * stacks + (jax.P(),) * shared
    # unchecked: a loop that begins with a constant, which JAX takes for equal on all devices, would be refused
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=jax.P("model"), check_vma=False)


def place_submodels(submodels: int, devices: Sequence[jax.Device] | None = None) -> Placement:
    """Distribute K sub-models evenly, on as few devices as that takes.

    Args:
        devices: all devices of all processes by default. With several processes every device must take part, so spare
            devices train copies.
    """
    devices = devices or jax.devices()
    per_device = -(-submodels // len(devices))
    needed = -(-submodels // per_device)
    if len({device.process_index for device in devices}) > 1:
        needed = len(devices)
    mesh = jax.make_mesh((needed,), ("model",), (jax.sharding.AxisType.Auto,), devices=devices[:needed])
    return Placement(np.arange(per_device * needed) % submodels, mesh)
