r"""One batch over many devices, by the placement of its arrays: the programs stay the same, and plain `jit` divides them.

A mesh has one axis, "batch". Arrays with a batch axis (start states, seeds) are sharded along it; policy, task and solver are
copied to every device. A batch that is made within a compiled function (the samples of a population) is sharded there
(`divided`). XLA divides every compiled function accordingly. Where it takes a mean over the batch, as in a gradient or a
product with the Gauss-Newton matrix,

$$N v = \tfrac1B \sum_i G_i^\top M_i G_i v = \tfrac1B \sum_{\text{devices}} \sum_{i \text{ on it}} G_i^\top M_i G_i v,$$

it adds the devices' sums: three times in a model and a product, outside its loops over time. The gradient of a rollout in the
parameters is summed in every step of the reverse pass, so its time depends on the network between devices. Sums in another
order differ by rounding: runs on four devices and on one agree to rounding, and less where the dynamics are chaotic.

The axes of the mesh are of type Auto: with explicit ones, `vmap` of a `scan` fails.

Several processes, one for each machine or GPU, run the same program; each holds all values of the batch and does its own
devices' part of the work. `init_distributed` connects them by `jax.distributed`. They must agree on when a run ends
(`broadcast`), and one of them writes the run (`primary_only`). Resume with the same number of processes (`resume_copies`).
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = "batch"  # the name of the mesh's axis
PROCESSES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def mesh_of(count: int) -> Mesh:
    """Make a mesh of devices, of all processes together.

    Args:
        count: Number of devices.

    Returns:
        The mesh, with one axis "batch".

    Raises:
        ValueError: If there are fewer devices, or if some process would have none.

    >>> mesh_of(1).axis_names, mesh_of(1).size
    (('batch',), 1)
    """
    devices = jax.devices()
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"devices must be a whole number of at least 1, got {count!r}")
    if count > len(devices):
        more = f"; XLA_FLAGS=--xla_force_host_platform_device_count={count} makes them" if _on_cpu() else ""
        raise ValueError(
            f"devices must be at most the {len(devices)} {devices[0].platform} there are, got {count}{more}"
        )
    if count < len(devices) and jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes have {len(devices)} devices, all to be used; got {count}")
    return jax.make_mesh((count,), (BATCH,), axis_types=(AxisType.Auto,), devices=devices[:count])


def shard(tree: Any, mesh: Mesh, *, what: str, axis: int = 0) -> Any:
    """Shard one axis of every leaf among the devices of a mesh.

    Args:
        tree: A pytree of arrays.
        mesh: The mesh.
        what: The things that the axis counts, for the error message.
        axis: The axis.

    Returns:
        The sharded tree.

    Raises:
        ValueError: If the devices do not divide the axis; the message names the nearest sizes that fit.

    >>> s0 = shard(jax.numpy.zeros((8, 2)), mesh_of(1), what="starts")
    >>> s0.shape
    (8, 2)
    """
    check_divisible(jax.tree.leaves(tree)[0].shape[axis], mesh.size, what)
    return _put(tree, NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH)))


def check_divisible(size: int, devices: int, what: str) -> None:
    """Refuse a size that the devices do not divide.

    Args:
        size: The size.
        devices: Number of devices.
        what: The things counted, for the error message.

    Raises:
        ValueError: If the size is not a multiple; the message names the nearest ones.
    """
    if size % devices:
        below = size // devices * devices
        nearest = [x for x in (below, below + devices) if x]
        raise ValueError(
            f"{size} {what} cannot be shared out evenly among {devices} devices; the nearest that can: "
            f"{' or '.join(map(str, nearest))}"
        )


def copied(tree: Any, mesh: Mesh) -> Any:
    """Copy the whole tree to every device of the mesh."""
    return _put(tree, NamedSharding(mesh, PartitionSpec()))


def replicate_like(batch: Any, tree: Any) -> Any:
    """Copy the whole tree to every device that holds a part of `batch`; return it unchanged if that is one device.

    Results of one compiled call are placed so before the next call, which would otherwise compile again.
    """
    mesh = _mesh(batch)
    return tree if mesh is None else copied(tree, mesh)


def shard_like(batch: Any, tree: Any) -> Any:
    """Shard the leading axis of the tree as that of `batch`; return it unchanged if the batch is on one device."""
    mesh = _mesh(batch)
    return tree if mesh is None else _put(tree, NamedSharding(mesh, PartitionSpec(BATCH)))


def divided(tree: Any, mesh: Mesh | None) -> Any:
    """Within a compiled function, shard the leading axis of every leaf among the devices; no change for None."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(BATCH)))


def gathered(tree: Any, mesh: Mesh | None) -> Any:
    """Within a compiled function, copy the whole tree to every device; no change for None."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def to_local(tree: Any) -> Any:
    """Gather the whole tree on one device of this process, to read it, save it or continue with it."""

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1:
            return x
        whole = _put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))  # type: ignore[attr-defined]
        return whole.addressable_data(0)

    return jax.tree.map(one, tree)


def init_distributed(count: int) -> None:
    """Connect this process to the others that the environment names, and split a CPU into devices. Call before computing.

    `JAX_COORDINATOR_ADDRESS` (host:port of the first process), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (from 0) name them;
    under Slurm or on a TPU pod the address is enough. A CPU is one device unless this or XLA_FLAGS makes more.

    Args:
        count: Number of devices of all processes.

    Raises:
        ValueError: If a number in the environment is not a whole number.
    """
    address, *numbers = (os.environ.get(name) for name in PROCESSES)
    given: dict[str, int] = {}
    if address is not None:
        for name, option, value in zip(PROCESSES[1:], ("num_processes", "process_id"), numbers, strict=True):
            if value is not None:
                if not value.isdecimal():
                    raise ValueError(f"{name} must be a whole number, got {value!r}")
                given[option] = int(value)
    each = count // given.get("num_processes", 1)
    if each > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # too late in this process: `mesh_of` reports the devices there are
            jax.config.update("jax_num_cpu_devices", each)
    if address is not None:
        jax.distributed.initialize(address, **given)  # pyright: ignore[reportArgumentType]


def broadcast(number: float, batch: Any = None) -> float:
    """Send the first process's number to all, so that a limit on time ends a run everywhere at once.

    With a `batch` on one device, whose work is its process's own, the number is returned unchanged.
    """
    if jax.process_count() == 1 or (batch is not None and _mesh(batch) is None):
        return number
    from jax.experimental import multihost_utils

    return float(multihost_utils.broadcast_one_to_all(np.float32(number)))


@contextlib.contextmanager
def primary_only(out: Path | None) -> Iterator[tuple[Path | None, Any]]:
    """Folder and stream that this process writes to: those asked for in the first process, temporary ones in the others."""
    if jax.process_index() == 0:
        yield out, None
        return
    scratch = Path(tempfile.mkdtemp(prefix="diffmbrl-process-"))
    try:
        with open(os.devnull, "w") as nowhere:
            yield scratch, nowhere
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def resume_copies(folder: Path) -> Iterator[tuple[Path, Any]]:
    """Folder in which this process resumes a run: its own in the first process, temporary copies in the others.

    All processes must see the folder. None starts before every one has its copy.
    """
    with primary_only(folder) as (place, stream):
        assert place is not None
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if place != folder:
                shutil.copytree(folder, place, symlinks=True, dirs_exist_ok=True)
            multihost_utils.sync_global_devices("every process has the run")
        yield place, stream


def _mesh(batch: Any) -> Mesh | None:
    sharding = getattr(jax.tree.leaves(batch)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def _put(tree: Any, sharding: NamedSharding) -> Any:
    """Place the leaves by a sharding; of an array that every process has whole, each device takes its part."""

    def one(x: Any) -> Any:
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):  # which `device_put` does not take between processes
            return jax.random.wrap_key_data(one(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        if len(x.sharding.device_set) > 1:
            return jax.device_put(x, sharding)
        values = np.asarray(x)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(one, tree)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
