"""`plan` predicts from shapes the memory, FLOPs and communication of the step that is run."""

import functools
import re

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from benchmarks import llama
from lora_jax import testing
from lora_jax._report.collectives import collectives

TINY = llama.Llama(layers=3, width=48, heads=8, hidden=80, kv_heads=4, vocabulary=160)
SPEC = {"blocks/{query,key,value,out,gate,up,down}": lj.LoRA(rank=4, alpha=8), "norm": lj.Full()}
TX = optax.adamw(1e-3)
BATCH = (4, 16)


def mesh_of(*sizes, names=("data", "model")):
    return Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), names)


def shape(*sizes, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


@functools.cache
def planned():
    mesh = mesh_of(2, 4)
    return lj.plan(llama.loss, TINY.shapes(mesh, jnp.float32), SPEC, TX, mesh, llama.tokens(mesh, *BATCH))


class Real:
    """The arrays of a run, made without `plan`: the adapter is sharded by hand."""

    def __init__(self):
        self.mesh = mesh_of(2, 4)
        numbers = np.random.default_rng(0)
        self.params = jax.tree.map(
            lambda x: jax.device_put(numbers.normal(0, 0.1, x.shape).astype(x.dtype), x.sharding),
            TINY.shapes(self.mesh, jnp.float32),
        )
        self.tokens = jax.device_put(jnp.arange(64).reshape(BATCH) % 7, NamedSharding(self.mesh, P("data")))
        with jax.set_mesh(self.mesh):
            kernels = lj.kernels(llama.loss, self.params, self.tokens)
        adapter = lj.init(jax.random.key(0), self.params, SPEC, kernels=kernels)
        self.adapter = {path: self.shard(path.split("/")[-1], part) for path, part in adapter.items()}

    def shard(self, name, part):
        wide, narrow = (None, "data", None), (None, "model", None)
        specs = {
            "query": {"a": wide, "b": (None, None, "model", None)},
            "key": {"a": wide, "b": (None, None, "model", None)},
            "value": {"a": wide, "b": (None, None, "model", None)},
            "gate": {"a": wide, "b": (None, None, "model")},
            "up": {"a": wide, "b": (None, None, "model")},
            "out": {"a": (None, "model", None, None), "b": (None, None, "data")},
            "down": {"a": narrow, "b": (None, None, "data")},
            "norm": {"value": ()},
        }[name]
        arrays = {key: jax.device_put(x, NamedSharding(self.mesh, P(*specs[key]))) for key, x in part.arrays.items()}
        return lj.Adapter(part.variant, part.axes, **arrays)

    def step(self, loss):
        def step(trained, state, *frozen):
            value, gradient = jax.value_and_grad(loss)(trained, *frozen)
            updates, state = TX.update(gradient, state, trained)
            return optax.apply_updates(trained, updates), state, value

        return step

    @property
    def lora(self):
        """The step that trains the adapter, and its arguments."""
        adapted = lj.lora(llama.loss)
        step = self.step(lambda adapter, params, tokens: adapted(params, adapter, tokens))
        return step, (self.adapter, TX.init(self.adapter), self.params, self.tokens)

    @property
    def full(self):
        return self.step(llama.loss), (self.params, TX.init(self.params), self.tokens)


def on_one_device(tree):
    """The bytes of real arrays that the first device holds."""
    shards = [shard for x in jax.tree.leaves(tree) for shard in jax.device_put(x, x.sharding).addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])


@functools.cache
def real():
    return Real()


@functools.cache
def program():
    """The step that trains the adapter, compiled as a user would."""
    step, args = real().lora
    out = (*(jax.tree.map(lambda x: x.sharding if x.ndim else None, tree) for tree in args[:2]), None)
    with jax.set_mesh(real().mesh):
        return jax.jit(step, out_shardings=out).lower(*args).compile()


def test_bytes_match_real_arrays():
    lora, full = planned().lora, planned().full
    assert lora.parameters == full.parameters == on_one_device(real().params)
    assert lora.adapter == on_one_device(real().adapter)
    assert lora.optimizer == on_one_device(TX.init(real().adapter))
    assert full.optimizer == on_one_device(TX.init(real().params))
    assert lora.inputs == on_one_device(real().tokens)
    assert full.adapter == 0


def test_the_peak_includes_all_memory_of_a_device():
    for step in (planned().lora, planned().full):
        memory = step.compiled.memory_analysis()
        held = step.parameters + step.adapter + step.optimizer + step.inputs
        norm = 4 * TINY.width  # under `Full`, so that the program does not read the base's leaf
        assert memory.argument_size_in_bytes == held - (norm if step.adapter else 0)
        assert step.temporary == memory.temp_size_in_bytes > 0
        # Trained arrays are updated in place; of the results, only the loss and the list of results are new.
        assert 0 <= step.peak - held - step.temporary < 2000


def test_the_program_is_the_training_step():
    _, args = real().lora
    trained, state, params, tokens = args
    copies = jax.tree.map(jnp.copy, (trained, state))  # the program donates them
    got = planned().lora.compiled((params, (tokens,), {}), *copies)
    helpers.assert_close(got, program()(*args))
    for before, after in zip(jax.tree.leaves(args[:2]), jax.tree.leaves(got[:2]), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, before.ndim) or before.ndim == 0


def test_flops_match_the_training_step():
    with jax.set_mesh(real().mesh):
        lora, full = (testing.flops(step, *args) for step, args in (real().lora, real().full))
    assert (planned().lora.flops, planned().full.flops) == (lora, full)
    assert planned().lora.flops_per_device == lora / 8


def test_bytes_sent_match_the_training_step():
    sent = sum(collective.wire for collective in collectives(program().as_text()))
    assert sum(planned().lora.wire.values()) == pytest.approx(sent, rel=0.05)


def test_each_gather_is_of_one_layer_and_full_fine_tuning_sends_more():
    found = planned()
    leaves = jax.tree.leaves(real().params)
    layer_bytes = max(x[0].nbytes if x.ndim > 2 else x.nbytes for x in leaves)
    assert 0 < found.lora.largest_gather <= layer_bytes
    assert found.lora.wire["all-reduce"] < found.full.wire["all-reduce"]
    assert found.lora.wire["all-gather"] <= 1.2 * found.full.wire["all-gather"]


def linear(params, x):
    return jnp.mean((x @ params["kernel"]) ** 2)


def linear_plan(*mesh, kernel=None, apply=linear, tx=TX, spec=None, **options):
    mesh = mesh_of(*(mesh or (8,)), names=("data",))
    params = {"kernel": shape(64, 32, sharding=NamedSharding(mesh, P(kernel)))}
    spec = spec or {"kernel": lj.LoRA(rank=2, alpha=4)}
    return lj.plan(apply, params, spec, tx, mesh, shape(16, 64, sharding=NamedSharding(mesh, P("data"))), **options)


def test_data_parallel_devices_send_the_gradient_of_the_adapter():
    found = linear_plan()
    around = 2 * 7 / 8  # on a ring of eight devices
    assert found.lora.wire["all-reduce"] == pytest.approx(around * (4 * 2 * (64 + 32) + 4), abs=4)
    assert found.full.wire["all-reduce"] == pytest.approx(around * (4 * 64 * 32 + 4), abs=4)
    assert set(found.lora.wire) == {"all-reduce"}


def test_one_device_sends_nothing():
    found = linear_plan(1)
    assert sum(found.lora.wire.values()) == 0
    assert found.devices == 1


def test_nothing_is_allocated():
    before = len(jax.live_arrays())
    jax.clear_caches()
    linear_plan(8)
    assert len(jax.live_arrays()) <= before


def test_a_leaf_without_a_sharding_is_replicated():
    mesh = mesh_of(8, names=("data",))
    params = {"kernel": np.ones((64, 32), np.float32)}
    found = lj.plan(linear, params, {"kernel": lj.LoRA(rank=2, alpha=4)}, TX, mesh, jnp.ones((16, 64)), full=False)
    assert found.lora.parameters == 4 * 64 * 32
    assert found.lora.inputs == 4 * 16 * 64


def test_an_argument_that_is_not_an_array_is_unchanged():
    def apply(params, x, *, mode, scale):
        assert (mode, scale) == ("train", 3)
        return linear(params, x)

    assert linear_plan(apply=apply, kwargs={"mode": "train", "scale": 3}).lora.inputs == 4 * 2 * 64


def test_keys_may_be_arguments_and_parameters():
    params, x = {"w": shape(8, 8), "key": jax.random.key(0)}, shape(4, 8)

    def apply(params, x, key):
        noise = jax.random.normal(key, (8,)) + jax.random.normal(params["key"], (8,))
        return x @ params["w"] + noise

    found = lj.plan(apply, params, {"w": lj.LoRA(rank=2, alpha=4)}, TX, mesh_of(1, 1), x, jax.random.key(1))
    assert found.lora.parameters == found.full.parameters == 8 * 8 * 4 + 8
    assert found.lora.inputs == 4 * 8 * 4 + 8


def test_only_floating_point_parameters_are_fine_tuned():
    mesh = mesh_of(2, names=("data",))
    params = {"kernel": shape(8, 4), "table": shape(8, dtype=jnp.int32), "name": "a string"}

    def apply(params, x):
        return (x @ params["kernel"])[:, params["table"] % 4]

    found = lj.plan(apply, params, {"kernel": lj.LoRA(rank=2, alpha=4)}, TX, mesh, shape(2, 8))
    assert found.full.parameters == 4 * (8 * 4 + 8)
    assert found.full.optimizer == 4 * (2 * 8 * 4 + 1)


def test_axes_come_from_the_model_and_leaves_may_be_boxed():
    model = nn.MultiHeadDotProductAttention(
        num_heads=4, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
    )
    x = shape(2, 8, 32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    spec = {"params/{query,out}/kernel": lj.LoRA(rank=2, alpha=4)}
    found = lj.plan(model.apply, params, spec, TX, mesh_of(2, names=("data",)), x)
    assert found.lora.adapter == 4 * 2 * (32 + 32) * 2
    assert found.full.optimizer == 2 * found.full.parameters + 4


@pytest.mark.parametrize(
    ("tx", "numbers"),
    [
        (optax.sgd(0.1), 0),
        (optax.sgd(0.1, momentum=0.9), 1),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.trace(0.9), {"kernel": True})), 1),
        (optax.MultiSteps(optax.trace(0.9), 4).gradient_transformation(), 2),
    ],
    ids=["sgd", "momentum", "masked", "accumulated"],
)
def test_optimizer_state_is_sharded_like_its_parameters(tx, numbers):
    found = linear_plan(kernel="data", tx=tx)
    assert 0 <= found.lora.optimizer - numbers * found.lora.adapter <= 12
    assert 0 <= found.full.optimizer - numbers * found.full.parameters <= 12
    assert found.lora.adapter == 4 * 2 * (64 // 8 + 32)


def test_optimizer_state_of_another_shape_is_replicated():
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    found = linear_plan(kernel="data", tx=tx)
    assert found.full.optimizer == sum(x.nbytes for x in jax.tree.leaves(tx.init({"kernel": jnp.ones((64, 32))})))


def test_a_16_bit_base_takes_half_and_the_adapter_is_unchanged():
    mesh = mesh_of(8, names=("data",))
    params = {"kernel": shape(64, 32, dtype=jnp.bfloat16)}
    found = lj.plan(linear, params, {"kernel": lj.LoRA(rank=2, alpha=4)}, TX, mesh, shape(16, 64, dtype=jnp.bfloat16))
    assert found.lora.parameters == 2 * 64 * 32
    assert found.lora.adapter == linear_plan(full=False).lora.adapter
    assert found.full.optimizer == 2 * found.full.parameters + 4
    half = {"kernel": lj.LoRA(rank=2, alpha=4)}
    assert lj.plan(linear, params, half, TX, mesh, shape(16, 64), param_dtype=jnp.bfloat16).lora.adapter == 2 * 2 * 96


def test_an_explicit_mesh_can_be_planned():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    params = {"kernel": shape(64, 32, sharding=NamedSharding(mesh, P()))}
    x = shape(16, 64, sharding=NamedSharding(mesh, P("data")))
    found = lj.plan(linear, params, {"kernel": lj.LoRA(rank=2, alpha=4)}, TX, mesh, x)
    assert found.lora.wire == linear_plan().lora.wire


# The loss


def test_the_default_loss_is_the_mean_of_the_result():
    def several(params, x):
        return {"y": (x @ params["kernel"]).astype(jnp.bfloat16), "seen": jnp.arange(3)}

    same = linear_plan(apply=several, loss=lambda out, x: 0 + out["y"].astype(jnp.float32).sum() / out["y"].size)
    assert linear_plan(apply=several).lora.flops == same.lora.flops


def test_a_loss_receives_the_results_and_arguments_of_the_model():
    seen = []

    def loss(out, x, *, mode):
        seen.append((out.shape, x.shape, mode))
        return jnp.mean(out)

    linear_plan(apply=lambda params, x, mode: x @ params["kernel"], loss=loss, kwargs={"mode": "train"})
    assert set(seen) == {((16, 32), (16, 64), "train")}


@pytest.mark.parametrize(
    "loss", [lambda out, x: x, lambda out, x: jnp.int32(1), lambda out, x: None], ids=["array", "integer", "none"]
)
def test_a_loss_that_is_not_a_scalar_is_an_error(loss):
    with pytest.raises(lj.SpecError, match=r"Expected a loss that is a floating-point scalar; got .*\n.*loss=lambda"):
        linear_plan(loss=loss)


def test_a_model_without_floating_point_results_is_an_error():
    with pytest.raises(lj.SpecError, match="Expected a loss that is a floating-point scalar; got"):
        linear_plan(apply=lambda params, x: jnp.argmax(x @ params["kernel"], -1))


# Meshes and shardings


def test_an_abstract_mesh_is_an_error_with_advice():
    with pytest.raises(lj.SpecError, match=r"got AbstractMesh.\n.*jax_num_cpu_devices") as caught:
        lj.plan(linear, {"kernel": shape(4, 4)}, {"kernel": lj.LoRA(rank=1, alpha=1)}, TX, AbstractMesh((8,), ("x",)))
    assert "jax.experimental.topologies" in str(caught.value)


def test_a_sharding_on_another_mesh_is_an_error():
    other = NamedSharding(mesh_of(4, names=("rows",)), P("rows"))
    params = {"dense": {"kernel": shape(64, 32, sharding=other)}}
    match = r"mesh {'data': 8}; that of `abstract_params\['dense'\]\['kernel'\]` is on {'rows': 4}."
    with pytest.raises(lj.SpecError, match=match):
        lj.plan(linear, params, {"**/kernel": lj.LoRA(rank=2, alpha=4)}, TX, mesh_of(8, names=("data",)), shape(16, 64))


def test_a_sharding_may_use_the_abstract_mesh():
    abstract = AbstractMesh((8,), ("data",))
    params = {"kernel": shape(64, 32, sharding=NamedSharding(abstract, P("data")))}
    x = shape(16, 64, sharding=NamedSharding(abstract, P("data")))
    mesh = mesh_of(8, names=("data",))
    found = lj.plan(linear, params, {"kernel": lj.LoRA(rank=2, alpha=4)}, TX, mesh, x, full=False)
    assert found.lora.parameters == 64 * 32 * 4 // 8


def test_a_sharding_that_does_not_divide_is_an_error():
    mesh = mesh_of(8, names=("data",))
    params = {"kernel": shape(63, 32, sharding=NamedSharding(mesh, P("data")))}
    with pytest.raises(
        lj.SpecError, match=r"`abstract_params\['kernel'\]`, shape \(63, 32\), has .*'data'.* on the mesh"
    ):
        lj.plan(linear, params, {"kernel": lj.LoRA(rank=2, alpha=4)}, TX, mesh, shape(16, 64))


def test_errors_of_init_and_lora_are_raised():
    with pytest.raises(lj.SpecError, match="nothing/here"):
        linear_plan(spec={"nothing/here": lj.LoRA(rank=2, alpha=4)})
    spec = {"kernel": lj.LoRA(rank=2, alpha=4, axes="io")}
    with pytest.raises(lj.UnsupportedError, match="sin"):
        linear_plan(apply=lambda params, x: x @ jnp.sin(params["kernel"]), spec=spec)
    linear_plan(apply=lambda params, x: x @ jnp.sin(params["kernel"]), spec=spec, materialize=["kernel"])


# Output


def test_a_plan_prints_as_a_table():
    head, rule, *rows = str(linear_plan()).split("\n")
    assert head.split() == ["per", "device", "LoRA", "full", "fine-tuning", "ratio"]
    assert set(rule) == {"─", " "}
    cells = [row.split() for row in rows]
    assert ["parameters", "8.2", "kB", "8.2", "kB", "1.000"] in cells
    assert ["adapter", "768", "B", "0", "B", "-"] in cells
    assert ["optimizer", "1.5", "kB", "16.4", "kB", "0.094"] in cells
    assert ["sent:", "all-reduce", "1.4", "kB", "14.3", "kB", "0.094"] in cells
    assert rows[-2] == "devices: 8 (data 8; cpu)"
    assert rows[-1] == "memory:  LoRA fits in 1 GB per device, full fine-tuning in 1 GB"


def test_without_full_fine_tuning_there_is_one_column():
    found = linear_plan(full=False)
    assert found.full is None
    assert str(found).split("\n")[0].split() == ["per", "device", "LoRA"]
    assert str(found).endswith("memory:  LoRA fits in 1 GB per device")


def test_a_plan_is_a_table_in_a_notebook():
    page = re.sub(r' style="[^"]*"', "", linear_plan()._repr_html_())
    assert page.startswith("<div><table><thead><tr><th>per device</th><th>LoRA</th>")
    assert "<td>parameters</td><td>8.2 kB</td>" in page
    assert page.endswith("</p>")


def test_flops_that_depend_on_values_are_unknown():
    found = linear_plan(apply=lambda params, x: jnp.abs(jnp.fft.fft(x @ params["kernel"])))
    assert found.lora.flops is found.lora.flops_per_device is None
    assert [line.split() for line in str(found).split("\n") if line.startswith("FLOPs")] == [
        ["FLOPs", "not", "known", "not", "known", "-"]
    ]


def test_bytes_sent_by_a_loop_of_unknown_length_are_unknown():
    def apply(params, x):
        y = x @ params["kernel"]
        return (
            jax.lax.while_loop(lambda y: jnp.max(y) > 1, lambda y: y / jnp.sum(jnp.abs(y)), jax.lax.stop_gradient(y))
            * y
        )

    found = linear_plan(apply=apply)
    assert found.lora.wire is found.lora.largest_gather is found.lora.collectives is None
    assert "not known" in str(found)


@pytest.mark.sweep
def test_seventy_billion_parameters_are_planned_in_little_memory():
    before = len(jax.live_arrays())
    mesh = mesh_of(1, 8)
    model = llama.Llama(layers=80, width=8192, heads=64, hidden=28672)
    found = lj.plan(llama.loss, model.shapes(mesh), SPEC, TX, mesh, llama.tokens(mesh, 1, 2048), full=False)
    assert found.lora.parameters > 17e9
    assert len(jax.live_arrays()) <= before
