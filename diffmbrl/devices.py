r"""One batch over many devices, by where its arrays lie alone: the programs are the same, and plain `jit` divides them.

A mesh has one axis, "batch". What has a batch axis (start states, seeds) is put on the mesh with that axis shared out
evenly; what all of the batch needs (policy, task, solver) is copied to every device. A batch that is made within a compiled
function (the samples of a population) is shared out there (`divided`). XLA divides every compiled function
accordingly, and where it takes a mean over the batch, as in a gradient or a product with the Gauss-Newton matrix,

$$N v = \tfrac1B \sum_i G_i^\top M_i G_i v = \tfrac1B \sum_{\text{devices}} \sum_{i \text{ on it}} G_i^\top M_i G_i v,$$

it adds the devices' sums: three times in a model and a product, outside its loops over time. The gradient of a rollout in the
parameters is added up in every step of the reverse pass, so there it is the network between devices that counts. Sums in
another order differ by rounding, so a run on four devices agrees with one on one device
as far as rounding does, and no further where the dynamics are chaotic.

The axes of the mesh are of type Auto: with explicit ones, `vmap` of a `scan` fails.

Several processes (one a machine, or one a GPU) run the same program, each with all of the batch's values at hand and its own
devices' part of the work: `init_distributed` connects them by `jax.distributed`. What ends a run must not differ
between them (`broadcast`), and one of them writes it down (`primary_only`). A run that was interrupted is gone on with
by as many processes (`resume_copies`).
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
    """A mesh of `count` devices, of all processes together.

    Raises: `ValueError` if there are not so many, or if they leave out a process.

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
    """The tree with this axis of every leaf shared out among the devices of the mesh; `what` it counts, for the message.

    Raises: `ValueError` naming the nearest sizes that fit, if the devices do not divide it.

    >>> s0 = shard(jax.numpy.zeros((8, 2)), mesh_of(1), what="starts")
    >>> s0.shape
    (8, 2)
    """
    check_divisible(jax.tree.leaves(tree)[0].shape[axis], mesh.size, what)
    return _put(tree, NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH)))


def check_divisible(size: int, devices: int, what: str) -> None:
    """Raises: `ValueError` naming the nearest sizes that fit, if the devices do not divide this one."""
    if size % devices:
        below = size // devices * devices
        nearest = [x for x in (below, below + devices) if x]
        raise ValueError(
            f"{size} {what} cannot be shared out evenly among {devices} devices; the nearest that can: "
            f"{' or '.join(map(str, nearest))}"
        )


def copied(tree: Any, mesh: Mesh) -> Any:
    """The tree whole on every device of the mesh."""
    return _put(tree, NamedSharding(mesh, PartitionSpec()))


def replicate_like(batch: Any, tree: Any) -> Any:
    """The tree whole on every device that a batch is shared out among; as it is where the batch is on one device.

    What one compiled call returns is laid so before the next call takes it: laid otherwise, that would be compiled again.
    """
    mesh = _mesh(batch)
    return tree if mesh is None else copied(tree, mesh)


def shard_like(batch: Any, tree: Any) -> Any:
    """The tree, with the batch's leading axis, shared out as the batch is; as it is where the batch is on one device."""
    mesh = _mesh(batch)
    return tree if mesh is None else _put(tree, NamedSharding(mesh, PartitionSpec(BATCH)))


def divided(tree: Any, mesh: Mesh | None) -> Any:
    """Within a compiled function: the leading axis of every leaf shared out among the devices; as it is for None."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(BATCH)))


def gathered(tree: Any, mesh: Mesh | None) -> Any:
    """Within a compiled function: the tree whole on every device; as it is for None."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def to_local(tree: Any) -> Any:
    """The tree whole on one device of this process, whatever devices it was on: to look at, save or go on with."""

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1:
            return x
        whole = _put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))  # type: ignore[attr-defined]
        return whole.addressable_data(0)

    return jax.tree.map(one, tree)


def init_distributed(count: int) -> None:
    """Before anything is computed: connect this process to the others, if the environment names them; on a CPU, have devices.

    `JAX_COORDINATOR_ADDRESS` (host:port of the first), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (from 0) say which they are;
    under Slurm or on a TPU pod the address alone will do. A CPU is one device unless told otherwise, here or in XLA_FLAGS.
    Raises: `ValueError` for a number that is none.
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
        with contextlib.suppress(RuntimeError):  # too late in this process: `mesh_of` says what there is
            jax.config.update("jax_num_cpu_devices", each)
    if address is not None:
        jax.distributed.initialize(address, **given)  # pyright: ignore[reportArgumentType]


def broadcast(number: float, batch: Any = None) -> float:
    """The first process's number, in all of them: what ends a run by its clock must end it everywhere at once.

    With a `batch` that lies on one device there is nothing to agree on: each process has work of its own.
    """
    if jax.process_count() == 1 or (batch is not None and _mesh(batch) is None):
        return number
    from jax.experimental import multihost_utils

    return float(multihost_utils.broadcast_one_to_all(np.float32(number)))


@contextlib.contextmanager
def primary_only(out: Path | None) -> Iterator[tuple[Path | None, Any]]:
    """Where this process writes, folder and stream: the first as asked, the others to a folder and a stream thrown away."""
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
    """Where this process goes on with a run: the first in its folder, the others in a copy of it that is thrown away.

    All of them have to see the folder. None begins before every one has its copy.
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
    """Leaves laid out so. Of an array that this process has whole, and so do the others, each device takes its part."""

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
