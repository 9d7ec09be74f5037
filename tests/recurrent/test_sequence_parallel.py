"""Time split over the devices of a mesh axis gives what one device computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxeff.recurrent import NewtonConfig, ParaGRU, ParaLSTM, parallel_rnn
from jaxeff.recurrent.cells import gru_jacobian, gru_step, lstm_jacobian, lstm_step

STEPS, WIDTH = 24, 3  # three steps on each of eight devices


def mixing_step(w, x, h):
    return jnp.tanh(h @ w + x)


def problem(name, scale=0.5):
    """Keyword arguments of `parallel_rnn`: two rows, an initial state that is not zero."""
    keys = jax.random.split(jax.random.key(0), 4)
    u = jax.random.normal(keys[0], (2, STEPS, 3, WIDTH))
    h0 = jax.random.normal(keys[1], (2, WIDTH))
    a = scale * jax.random.normal(keys[2], (3, WIDTH))
    if name == "gru":
        return {"params": {"a": a}, "inputs": u, "h0": h0}, gru_step, gru_jacobian, "diagonal"
    if name == "lstm":
        params = {"a": a, "peephole": a[:2] / 2}
        h0 = jnp.stack([h0, jnp.tanh(h0)], axis=1)
        return {"params": params, "inputs": u, "h0": h0}, lstm_step, lstm_jacobian, "block"
    return {"params": a, "inputs": u[:, :, 0], "h0": h0}, mixing_step, None, "dense"


def split(function, axis_name):
    """`function` of (params, inputs, h0), with the steps of inputs and states over 8 devices."""
    mesh = Mesh(jax.devices()[:8], (axis_name,))
    by_time = P(None, axis_name)
    return jax.shard_map(
        function, mesh=mesh, in_specs=(P(), by_time, P()), out_specs=(by_time, P())
    )


def graded(name, axis_name=None, scale=0.5, **options):
    """States, SolveInfo, and the gradients of a loss of the states."""
    arguments, step, jacobian, structure = problem(name, scale)

    def run(params, inputs, h0):
        return parallel_rnn(
            step, params, inputs, h0, structure=structure, jacobian_fn=jacobian,
            axis_name=axis_name, **options
        )  # fmt: skip

    def loss(params, inputs, h0):
        states, info = (split(run, axis_name) if axis_name else run)(params, inputs, h0)
        weights = jnp.cos(jnp.arange(states.size)).reshape(states.shape)
        return jnp.sum(weights * jnp.sin(states)), (states, info)

    grads, (states, info) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arguments.values())
    return states, info, grads


def assert_same(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual[0], expected[0], atol=atol)
    np.testing.assert_allclose(actual[1].residual, expected[1].residual, atol=atol)
    for g, e in zip(jax.tree.leaves(actual[2]), jax.tree.leaves(expected[2]), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-4 * np.abs(e).max())


@pytest.mark.parametrize("name", [pytest.param("gru", marks=pytest.mark.slow), "lstm", "dense"])
def test_states_and_gradients_are_those_of_one_device(name):
    # So few iterations that the answer is not yet that of the loop: the iterates must agree too.
    newton = NewtonConfig(2)
    assert_same(graded(name, "time", newton=newton), graded(name, newton=newton))


@pytest.mark.slow
def test_iterations_stop_when_the_largest_residual_of_all_devices_is_small():
    newton = NewtonConfig(20, tolerance=1e-5)
    split, whole = (graded("gru", axis, newton=newton) for axis in ("time", None))
    assert 1 < split[1].iterations == whole[1].iterations < 20
    assert_same(split, whole)


def test_the_loop_over_time_runs_the_devices_in_turn():
    assert_same(graded("lstm", "time", method="sequential"), graded("lstm", method="sequential"))


def test_the_fallback_answers_where_newton_diverges():
    split = graded("gru", "time", scale=6.0, newton=NewtonConfig(2, fallback="sequential"))
    exact = graded("gru", scale=6.0, method="sequential")
    assert split[1].fallback.any() and split[1].residual.max() > 1e-2
    np.testing.assert_allclose(split[0], exact[0], atol=1e-5)
    for g, e in zip(jax.tree.leaves(split[2]), jax.tree.leaves(exact[2]), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-4 * np.abs(e).max())


@pytest.mark.parametrize("cell", [pytest.param(ParaGRU, marks=pytest.mark.slow), ParaLSTM])
def test_a_module_runs_on_its_share_of_the_steps(cell):
    whole, part = (cell(4, num_heads=2, axis_name=axis) for axis in (None, "time"))
    x = jax.random.normal(jax.random.key(0), (2, STEPS, 6))
    start = functools.partial(whole.init, method="step")
    variables = jax.jit(start)(jax.random.key(1), whole.initial_state(2), x[:, 0])
    state = jax.tree.map(lambda s: s + 0.3, whole.initial_state(2))
    reset = jnp.zeros((2, STEPS), bool).at[0, 9].set(True).at[1, 12].set(True)
    lengths = jnp.array([0, 13])

    def run(model, variables, inputs, state):
        x, reset = inputs
        return model.apply(
            variables, x, state, reset=reset, return_carry=True, lengths=lengths
        )  # fmt: skip

    y, carry = jax.jit(split(functools.partial(run, part), "time"))(variables, (x, reset), state)
    expected = jax.jit(functools.partial(run, whole))(variables, (x, reset), state)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5), (y, carry), expected)
    jax.tree.map(lambda c, s: np.testing.assert_array_equal(c[0], s[0]), carry, state)


def sent(jaxpr):
    """Primitives and shapes of all that the devices of a program tell one another."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("ppermute", "all_gather", "pmax", "psum", "psum_invariant"):
            yield eqn.primitive.name, [v.aval.shape for v in eqn.invars]
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sent(inner)


def test_what_travels_does_not_grow_with_the_steps():
    def traffic(steps):
        run = functools.partial(parallel_rnn, gru_step, axis_name="time", jacobian_fn=gru_jacobian)
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        arguments = {"a": shape((3, WIDTH))}, shape((1, steps, 3, WIDTH)), shape((1, WIDTH))

        def loss(*arguments):
            return jnp.sum(split(run, "time")(*arguments)[0])

        return sorted(sent(jax.make_jaxpr(jax.grad(loss))(*arguments).jaxpr))

    short, long = traffic(32), traffic(256)
    assert {"ppermute", "all_gather"} <= {name for name, _ in short}
    assert short == long


@pytest.mark.parametrize(
    ("name", "scale", "check_vma"),
    [
        ("gru", 2.0, True),
        pytest.param("gru", 2.0, False, marks=pytest.mark.slow),
        pytest.param("lstm", 3.0, True, marks=pytest.mark.slow),
    ],
)
def test_batch_and_time_are_split_together(name, scale, check_vma):
    newton = NewtonConfig(5, tolerance=1e-4, fallback="sequential")
    arguments, step, jacobian, structure = problem(name, scale)
    mesh = Mesh(np.reshape(jax.devices()[:8], (2, 4)), ("data", "time"))
    split_specs = (P(), P("data", "time"), P("data")), (P("data", "time"), P("data"))

    def run(params, inputs, h0, axis_name=None):
        states, info = parallel_rnn(
            step, params, inputs, h0, structure=structure, jacobian_fn=jacobian, newton=newton,
            axis_name=axis_name,
        )  # fmt: skip
        return states, info.fallback

    both = jax.shard_map(
        functools.partial(run, axis_name="time"),
        mesh=mesh,
        in_specs=split_specs[0],
        out_specs=split_specs[1],
        check_vma=check_vma,
    )

    def graded(run):
        def loss(*arguments):
            states, failed = run(*arguments)
            return jnp.sum(jnp.sin(states)), (states, failed)

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arguments.values())

    (grads, (states, failed)), (expected_grads, (expected, expected_failed)) = (
        graded(both), graded(run)
    )  # fmt: skip
    np.testing.assert_array_equal(failed, expected_failed)
    np.testing.assert_allclose(states, expected, atol=1e-4)
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-3 * np.abs(e).max())
    # Only the first half of the GRU's devices needs the fallback; the others take part in it.
    assert failed[0] and (name == "lstm" or not failed[1])
