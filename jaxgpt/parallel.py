"""One model over many devices, of one host or of several: meshes, shardings from one table of rules, start-up.

    layout = Layout(data=4, model=2, fsdp=True)
    (mesh,) = lanes(layout, jax.devices())  # of 8
    state = put(state, shardings(state, mesh, layout, config.model))
    with jax.set_mesh(mesh):
        state, metrics = step.advance(program, state, n, h, put(data, replicated(data, mesh)))
    state = gather(state)  # NumPy, on every host

A step is written for one device; XLA divides it by where its inputs lie (`put`) and by where `over_data` stands, and
adds what has to be sent. So a layout changes the rounding of a run and nothing else, and is no part of its identity.
Under several processes every one of them calls `put`, `gather`, `agree` and `any_host` at the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import BadInput, ModelConfig, RunConfig
from jaxgpt.store import StoreError

# --- layouts and their devices -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How one model lies on devices. data: groups of devices that share a batch's rows. model: devices of a group, that
    share heads, MLP and vocabulary (Shoeybi et al. 2019). fsdp: the groups also share parameters, their running mean
    and the optimizer's state (Zhao et al. 2023; ZeRO-3 of Rajbhandari et al. 2020); else each holds all of them.
    """

    data: int = 1
    model: int = 1
    fsdp: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "model"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInput(f"layout.{name}={value} must be a whole number, 1 or more")
        if self.fsdp and self.data == 1:
            raise BadInput("layout.fsdp=true shares parameters over layout.data, which is 1; it must be 2 or more")

    def __str__(self) -> str:
        return f"data={self.data},model={self.model}" + ",fsdp" * self.fsdp

    @property
    def size(self) -> int:
        """Devices of one model."""
        return self.data * self.model


ONE_DEVICE = Layout()


def check(layout: Layout, config: RunConfig) -> None:
    """Raises BadInput where a run cannot be spread so, or where spreading it would divide nothing.

    What is not divisible within a model, such as a single tensor, is held whole by every device instead.
    """
    t, c = config.train, config.model
    if t.batch_size // t.microbatches % layout.data:
        each = "" if t.microbatches == 1 else f" / train.microbatches={t.microbatches}"
        raise BadInput(f"train.batch_size={t.batch_size}{each} must be divisible by layout.data={layout.data}")
    if layout.model > 1 and c.architecture != "transformer":
        raise BadInput(f"layout.model={layout.model} is for model.architecture=transformer, not {c.architecture}")
    mlp_width = 0 if c.mlp == "none" else c.mlp_width
    if layout.model > 1 and c.n_heads % layout.model and (not mlp_width or mlp_width % layout.model):
        raise BadInput(
            f"layout.model={layout.model} divides neither model.n_heads={c.n_heads} nor the MLP's width {mlp_width}; "
            "it must divide one of them"
        )


def lanes(layout: Layout, devices: Sequence[Any]) -> list[Mesh]:
    """The grid of devices [run, data, model] cut along `run`: for each model a mesh with axes data and model.

    Devices that do not make up a lane are left out. Raises BadInput for fewer devices than one lane has, and under
    several processes for more than one lane: hosts that train models of their own need not know of each other.
    """
    count, asked = len(devices) // layout.size, f"layout.data={layout.data} x layout.model={layout.model}"
    if not count:
        raise BadInput(f"{asked} needs {layout.size} devices; there are {len(devices)}")
    if jax.process_count() > 1 and len(devices) != layout.size:
        raise BadInput(
            f"{asked} must be all {len(devices)} devices of the {jax.process_count()} processes that train one model; "
            "for models of their own start them apart"
        )
    # JAX knows which devices are neighbours: on a TPU, not those of consecutive numbers.
    grid = jax.make_mesh(
        (count, layout.data, layout.model),
        ("run", "data", "model"),
        axis_types=(AxisType.Auto,) * 3,
        devices=devices[: count * layout.size],
    ).devices
    return [Mesh(lane, ("data", "model"), axis_types=(AxisType.Auto,) * 2) for lane in grid]


# --- what lies where -----------------------------------------------------------------------------------------------

# Which axis of the mesh divides each axis of a parameter, by the end of its name; axes before these (of layers, of
# experts, of runs) are not divided. "data" counts with fsdp only. What multiplies the stream is divided by its columns
# and what writes to it by its rows, so that a block sends twice: after attention and after the MLP (Shoeybi et al.
# 2019, section 3). Each expert is divided as an MLP is, and none lives on one device alone: routing then sends
# nothing and no device waits for a popular expert.
RULES: dict[str, tuple[str | None, ...]] = {
    "embed.embedding": ("model", "data"),
    "position.embedding": (None, "data"),
    "read_in.kernel": (None, "data"),
    "query.kernel": ("data", "model"),
    "query.bias": ("model",),
    "key.kernel": ("data", "model"),
    "key.bias": ("model",),
    "value.kernel": ("data", "model"),
    "value.bias": ("model",),
    "attention.out.kernel": ("model", "data"),
    "up.kernel": ("data", "model"),
    "up.bias": ("model",),
    "gate.kernel": ("data", "model"),
    "gate.bias": ("model",),
    "down.kernel": ("model", "data"),
    "unembed.kernel": ("data", "model"),
    "unembed.bias": ("model",),
    # Used whole at every position: divided, it would be sent at every position too.
    "dense_i.kernel": (None, None),
    "dense_h.kernel": (None, None),
}


def shardings(tree: Any, mesh: Mesh, layout: Layout, model: ModelConfig, leading: int = 0) -> Any:
    """Where each array of a state, or of parameters, lies: a tree of NamedShardings. `tree` may be abstract.

    An optimizer's moments and the running mean lie as the parameter of their name does. A name without a rule, of a
    task's own model, is divided over data along its longest axis if it is a matrix; vectors and numbers are not.
    `leading`: axes in front that count runs, never divided.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        axes = list(_axes(name, leaf.shape, leading))
        for axis, over in enumerate(axes):
            units = leaf.shape[axis] if over is None else _units(name, over, leaf.shape[axis], model)
            if over is None or (over == "data" and not layout.fsdp) or units % mesh.shape[over]:
                axes[axis] = None
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _axes(name: str, shape: tuple[int, ...], leading: int) -> tuple[str | None, ...]:
    """The axis of the mesh for each axis of an array, before asking what is divisible."""
    rules = [rule for end, rule in RULES.items() if f".{name}".endswith(f".{end}")]
    if rules and len(rules[0]) <= len(shape) - leading:
        return (None,) * (len(shape) - len(rules[0])) + rules[0]
    own = shape[leading:]
    longest = leading + own.index(max(own)) if len(own) > 1 else None
    return tuple("data" if axis == longest else None for axis in range(len(shape)))


def _units(name: str, over: str, size: int, model: ModelConfig) -> int:
    """How many pieces an axis may be cut into: of attention no head is cut, as its scores would have to be sent."""
    *_, owner, _ = ["", *name.split(".")]
    heads = {"query": model.n_heads, "out": model.n_heads, "key": model.kv_heads, "value": model.kv_heads}
    return heads[owner] if over == "model" and owner in heads else size


def replicated(tree: Any, mesh: Mesh) -> Any:
    """Shardings by which every device holds all of each array."""
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def put(tree: Any, shardings: Any) -> Any:
    """Arrays, of which each process has all values, laid out by shardings, also over devices of other processes."""

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        # device_put would first compare the values of all processes, whole.
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree, shardings)


def gather(tree: Any) -> Any:
    """The arrays whole, as NumPy, on every host. One at a time passes through a device whole, where hosts share it."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            from jax.experimental.multihost_utils import process_allgather

            return process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


@dataclass(frozen=True)
class Lane:
    """Where a block of runs is trained: one device (None: JAX's default), or a mesh of several that hold each model."""

    device: Any = None
    mesh: Mesh | None = None
    layout: Layout = ONE_DEVICE

    def put(self, tree: Any) -> Any:
        """What every device of the lane reads whole."""
        return jax.device_put(tree, self.device) if self.mesh is None else put(tree, replicated(tree, self.mesh))

    def put_states(self, states_R: Any, model: ModelConfig) -> Any:
        """States of runs, stacked, as the layout has them."""
        if self.mesh is None:
            return jax.device_put(states_R, self.device)
        return put(states_R, shardings(states_R, self.mesh, self.layout, model, leading=1))

    def active(self) -> AbstractContextManager:
        """While it is entered, in one thread, what is computed is computed here."""
        return jax.default_device(self.device) if self.mesh is None else jax.set_mesh(self.mesh)


# --- batches -------------------------------------------------------------------------------------------------------


def over_data(tree: Any, axis: int = 0) -> Any:
    """Inside jit: the arrays, divided over data along `axis` and no other, if a mesh is set (jax.set_mesh). Without
    one, or with one device, or where the axis is not divisible, they are as they were and nothing is compiled for it.

    XLA would find a division by itself, but not always this one: tables that are divided over data would have it
    divide the stream by its width, and send it at every product.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "data" not in mesh.axis_names or mesh.size == 1:
        return tree

    def constrained(x: jax.Array) -> jax.Array:
        if x.ndim <= axis or x.shape[axis] % mesh.shape["data"]:
            return x
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, "data"))

    return jax.tree.map(constrained, tree)


def each_group(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Inside jit: function(*arrays), which treats the rows of its arrays alike, called once for the rows of each data
    group, so that what it does across rows (sorting them, say) sends nothing. Without a mesh it is called as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    groups = mesh.shape.get("data", 1)
    if groups == 1 or arrays[0].shape[0] % groups:
        return function(*arrays)
    split = over_data([x.reshape(groups, -1, *x.shape[1:]) for x in arrays])
    out = over_data(jax.vmap(function)(*split))
    return out.reshape(-1, *out.shape[2:])


def rows(mesh: Mesh, batch_size: int) -> slice:
    """Which rows of each batch the devices of this process need; all of them under one process."""
    places = NamedSharding(mesh, PartitionSpec("data")).addressable_devices_indices_map((batch_size,))
    spans = [index[0].indices(batch_size) for index in places.values() if index is not None]
    return slice(min(start for start, _, _ in spans), max(stop for _, stop, _ in spans))


def from_rows(tree: Any, mesh: Mesh, batch_size: int, axis: int = 0) -> Any:
    """Whole batches on the devices from each process's own rows of them: NumPy arrays with `rows` along `axis`."""
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))

    def whole(own: np.ndarray) -> jax.Array:
        shape = (*own.shape[:axis], batch_size, *own.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, own, shape)

    return jax.tree.map(whole, tree)


# --- several hosts -------------------------------------------------------------------------------------------------


def start_hosts(address: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Makes this process number `index` of `count` that train one model; process 0 listens at `address`, host:port.
    Before the first use of JAX. Without arguments they come from the cluster, as JAX recognises it:

    - Slurm: inside `srun`, from SLURM_JOB_ID, SLURM_STEP_NODELIST, SLURM_NTASKS, SLURM_PROCID and SLURM_LOCALID; each
      process gets the one GPU of its SLURM_LOCALID. In an `sbatch` script without `srun` it is not recognised.
    - Kubernetes: an indexed Job with a headless service, the `kubernetes` package (`jax[k8s]`) and a service account
      that may read pods, jobs and services.
    - TPU pods and Open MPI's mpirun: by themselves.

    JAX_COORDINATOR_PORT chooses the port on these. On CPU the processes talk by Gloo, JAX's default. Raises BadInput
    without a cluster or with some arguments only.
    """
    given = {"address": address, "count": count, "index": index}
    if None in given.values() and any(value is not None for value in given.values()):
        missing = ", ".join(name for name, value in given.items() if value is None)
        raise BadInput(f"start_hosts needs address, count and index, or none of them on a cluster; missing: {missing}")
    if count is not None and count < 1:
        raise BadInput(f"count={count} is not allowed; it must be 1 or more")
    if count is not None and index is not None and not 0 <= index < count:
        raise BadInput(f"index={index} must be from 0 to {count - 1}, one less than count={count}")
    # JAX's service takes SIGTERM for itself, in place of the handler that saves and stops.
    jax.config.update("jax_enable_preemption_service", False)
    local = address is not None and address.rpartition(":")[0] in ("localhost", "127.0.0.1")
    try:
        # Process 0 listens on all interfaces unless told otherwise.
        jax.distributed.initialize(address, count, index, coordinator_bind_address=address if local else None)
    except RuntimeError as error:  # nobody came, or the address is not to be had
        raise BadInput(f"the hosts did not meet at {address}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        if address is not None:
            raise
        raise BadInput(
            "no cluster was recognised (Slurm's srun, Kubernetes, a TPU pod, mpirun); "
            "give address=HOST:PORT, count and index"
        ) from error


def host_device() -> Any:
    """The CPU as a JAX device, where it has one beside the accelerator; else None, JAX's default."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None


def is_writer() -> bool:
    """Whether this is the process that writes files, number 0."""
    return jax.process_index() == 0


def agree(n: int | bool) -> int:
    """Process 0's n, on every process; |n| < 2^31. What decides which program is dispatched next has to be agreed on:
    two processes that dispatch different ones wait for each other for ever.
    """
    if jax.process_count() == 1:
        return n
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return int(broadcast_one_to_all(np.int32(n)))


def any_host(flag: bool) -> bool:
    """Whether the flag is true on any process: a signal to stop may reach one host only."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    return bool(process_allgather(np.int32(flag)).any())


def by_writer(write: Callable[[], None], what: str) -> None:
    """Does on process 0 what is to be done once, while the others wait. If it fails there, all raise."""
    error: Exception | None = None
    try:
        if is_writer():
            write()
    except Exception as raised:
        error = raised
    failed = agree(error is not None)
    if error is not None:
        raise error
    if failed:
        raise StoreError(f"process 0 could not {what}; its own message says why")
