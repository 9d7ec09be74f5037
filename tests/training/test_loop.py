"""The loop: exact resume, sharding, accumulation, controllers, signals, bad numbers."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import RegressionTask

from jaxeff.training import (
    CheckpointConfig,
    CheckpointError,
    MeshConfig,
    NonFiniteError,
    OptimizerConfig,
    Plan,
    Trainer,
    TrainingConfig,
)
from jaxeff.training.trackers import read_metrics

ONE = jax.devices()[:1]


def make_trainer(task=None, steps=30, devices=ONE, mesh=None, **settings):
    training = {"num_steps": steps, "log_every": 5, "tensorboard": False, "progress": False}
    checkpoint = settings.pop("checkpoint", {"every": 0})
    optimizer = settings.pop("optimizer", {"learning_rate": 1e-2, "schedule": "constant"})
    controller = settings.pop("controller", None)
    return Trainer(
        task or RegressionTask(),
        optimizer=OptimizerConfig(**optimizer),
        training=TrainingConfig(**(training | settings)),
        checkpoint=CheckpointConfig(**checkpoint),
        mesh=mesh or MeshConfig(),
        seed=3,
        controller=controller,
        devices=devices,
    )


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def assert_bit_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(leaves(a), leaves(b)):
        np.testing.assert_array_equal(x, y)


def test_training_lowers_the_loss_and_leaves_its_records(tmp_path):
    trainer = make_trainer(steps=60, eval_every=20, tensorboard=True)
    result = trainer.fit(tmp_path, {"seed": 3})
    records = read_metrics(tmp_path / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in train] == list(range(5, 61, 5))
    assert [r["step"] for r in evals] == [20, 40, 60]
    assert evals[-1]["loss"] < 0.5 * evals[0]["loss"]
    assert train[0]["rows_per_second"] > 0 and train[0]["learning_rate"] == pytest.approx(1e-2)
    assert result.evaluation["loss"] == evals[-1]["loss"]
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 3}
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert (tmp_path / "checkpoints" / "60").is_dir()
    assert trainer.task.iterators[-1].closed
    assert result.num_compilations == 1


def test_resume_equals_an_uninterrupted_run_bit_for_bit(tmp_path):
    settings = {"ema_rates": (0.9,), "checkpoint": {"every": 10, "keep": 3}}
    straight = make_trainer(steps=30, **settings).fit(tmp_path / "a")
    make_trainer(steps=10, **settings).fit(tmp_path / "b")
    resumed = make_trainer(steps=30, **settings).fit(tmp_path / "b")
    assert_bit_equal(straight.state, resumed.state)
    assert int(resumed.state.extra["steps_seen"]) == 30
    steps = [
        r["step"] for r in read_metrics(tmp_path / "b" / "metrics.jsonl") if r["kind"] == "train"
    ]
    assert steps == [5, 10, 15, 20, 25, 30]


def test_a_finished_run_started_again_only_evaluates(tmp_path):
    make_trainer(steps=10).fit(tmp_path)
    again = make_trainer(steps=10).fit(tmp_path)
    assert int(again.state.step) == 10 and again.evaluation and again.num_compilations == 0


def test_records_after_the_restored_step_are_dropped(tmp_path):
    make_trainer(steps=10, checkpoint={"every": 10}).fit(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 15, "kind": "train", "loss": 1.0}) + "\n")
        file.write('{"step": 20, "ki')  # the line a crash cut short
    make_trainer(steps=20).fit(tmp_path)
    steps = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == [5, 10, 15, 20]


@pytest.mark.parametrize("accumulation_steps", [2, 4])
def test_accumulation_equals_one_large_batch(tmp_path, accumulation_steps):
    """Also with uneven weights: the mean is over the global batch, not over micro-batches."""
    whole = make_trainer(RegressionTask(noise=0.0), steps=8).fit(tmp_path / "a")
    split = make_trainer(
        RegressionTask(noise=0.0), steps=8, accumulation_steps=accumulation_steps
    ).fit(tmp_path / "b")
    for x, y in zip(leaves(whole.state.params), leaves(split.state.params)):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_eight_devices_train_like_one(tmp_path, mesh, accumulation_steps):
    settings = {"steps": 8, "accumulation_steps": accumulation_steps}
    one = make_trainer(**settings).fit(tmp_path / "a")
    many = make_trainer(devices=jax.devices()[:8], mesh=MeshConfig(**mesh), **settings).fit(
        tmp_path / "b"
    )
    for x, y in zip(leaves(one.state), leaves(many.state)):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    kernel = many.state.params["up"]["kernel"]
    ways = mesh.get("fsdp", 1) * mesh.get("tensor", 1)
    assert kernel.addressable_shards[0].data.size * ways == kernel.size
    moment = jax.tree.leaves(many.state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
    moments = [x.mu["up"]["kernel"] for x in moment if hasattr(x, "mu")]
    assert moments and moments[0].sharding == kernel.sharding


def test_a_checkpoint_restores_onto_another_mesh(tmp_path):
    checkpoint = {"every": 5}
    make_trainer(steps=10, checkpoint=checkpoint).fit(tmp_path)
    mesh = MeshConfig(data=2, fsdp=4)
    trainer = make_trainer(steps=20, devices=jax.devices()[:8], mesh=mesh, checkpoint=checkpoint)
    many = trainer.fit(tmp_path)
    one = make_trainer(steps=20).fit(tmp_path / "one")
    assert int(many.state.step) == 20
    for x, y in zip(leaves(one.state), leaves(many.state)):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_ema_follows_its_recursion(tmp_path):
    result = make_trainer(steps=1, ema_rates=(0.5, 0.9)).fit(tmp_path)
    start = make_trainer().init_state()
    for rate in (0.5, 0.9):
        expected = jax.tree.map(
            lambda p0, p1, r=rate: r * p0 + (1 - r) * p1, start.params, result.state.params
        )
        for x, y in zip(leaves(expected), leaves(result.state.ema[str(rate)])):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
    assert "loss_ema_0.9" in result.evaluation


def test_the_key_of_a_step_depends_on_seed_and_step_alone():
    state = make_trainer().init_state()
    later = state.replace(step=jnp.int32(5))
    expected = jax.random.fold_in(jax.random.key(3), 5)
    assert jax.random.key_data(later.step_key()).tolist() == jax.random.key_data(expected).tolist()


class DepthController:
    """Switches a static value every ten steps and counts what it observes."""

    def __init__(self, observe_every):
        self.observe_every = observe_every
        self.seen = []
        self.unseen_at_proposal = []

    def propose(self, step):
        self.unseen_at_proposal.append(step - len(self.seen))
        return Plan(static=("depth", (step // 10) % 2), dynamic={"learning_rate": np.float32(1e-2)})

    def observe(self, step, metrics):
        assert isinstance(metrics["loss"], float)
        self.seen.append(step)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


@pytest.mark.parametrize("observe_every", [1, 3, None])
def test_a_controller_sees_every_step_in_order_and_compiles_once_per_static_plan(
    tmp_path, observe_every
):
    controller = DepthController(observe_every)
    result = make_trainer(steps=40, controller=controller).fit(tmp_path)
    assert controller.seen == list(range(40))
    assert result.num_compilations == 2
    assert max(controller.unseen_at_proposal) < (observe_every or 5)


def test_a_controllers_state_is_in_the_checkpoint(tmp_path):
    make_trainer(steps=10, controller=DepthController(None)).fit(tmp_path)
    controller = DepthController(None)
    make_trainer(steps=12, controller=controller).fit(tmp_path)
    assert controller.seen == list(range(12))


def test_a_plan_reaches_the_loss(tmp_path):
    class Planned(RegressionTask):
        scale = 1.0

        def with_plan(self, plan):
            task = Planned(noise=0.0)
            task.scale = plan.dynamic["scale"]
            return task

        def loss(self, params, extra, batch, key, step):
            loss, aux = super().loss(params, extra, batch, key, step)
            return loss * self.scale, aux

    class Zero(DepthController):
        def propose(self, step):
            return Plan((), {"learning_rate": np.float32(1e-2), "scale": np.float32(0)})

    result = make_trainer(Planned(), steps=3, controller=Zero(None)).fit(tmp_path)
    start = make_trainer().init_state()
    assert_bit_equal(start.params, result.state.params)


def test_a_metric_that_is_not_finite_ends_the_run_with_its_step_and_name(tmp_path):
    trainer = make_trainer(RegressionTask(poison_at=12), steps=40, checkpoint={"every": 10})
    with pytest.raises(NonFiniteError, match="loss is nan at step 12") as caught:
        trainer.fit(tmp_path)
    assert caught.value.step == 12 and caught.value.metric == "loss"
    assert (tmp_path / "checkpoints" / "10").is_dir()
    assert not (tmp_path / "checkpoints" / "20").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on_exactly(tmp_path, number):
    class Interrupted(RegressionTask):
        """Gets the signal while the batch of step 7 is fetched."""

        def train_iterator(self, *shard):
            iterator = super().train_iterator(*shard)

            class Signalling(type(iterator)):
                def __next__(self):
                    if self.position == 7:
                        os.kill(os.getpid(), number)
                    return super().__next__()

            iterator.__class__ = Signalling
            return iterator

    stopped = make_trainer(Interrupted(), steps=3000).fit(tmp_path / "a")
    assert stopped.stopped and int(stopped.state.step) == 8
    end = int(stopped.state.step) + 20
    resumed = make_trainer(steps=end).fit(tmp_path / "a")
    straight = make_trainer(steps=end).fit(tmp_path / "b")
    assert_bit_equal(straight.state, resumed.state)


def test_another_model_in_the_workdir_is_refused(tmp_path):
    make_trainer(steps=5).fit(tmp_path)
    with pytest.raises(CheckpointError, match="down/kernel is float32"):
        make_trainer(RegressionTask(hidden=32), steps=10).fit(tmp_path)
    assert (tmp_path / "checkpoints" / "5").is_dir()


def test_a_workdir_that_cannot_be_written_is_refused_before_training(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        make_trainer().fit(blocked / "run")


def test_too_little_disk_space_is_refused_before_training(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(CheckpointError, match="checkpoints need up to"):
        make_trainer().fit(tmp_path)


def test_a_tasks_final_transformation_bounds_the_parameters_of_every_step(tmp_path):
    class Bounded(RegressionTask):
        def final_transform(self):
            def update(updates, state, params):
                return jax.tree.map(
                    lambda u, p: jnp.clip(p + u, -0.2, 0.2) - p, updates, params
                ), state

            return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    free = make_trainer(steps=12, checkpoint={"every": 6}).fit(tmp_path / "free")
    assert max(np.abs(x).max() for x in leaves(free.state.params)) > 0.5
    make_trainer(Bounded(), steps=6, checkpoint={"every": 6}).fit(tmp_path / "bounded")
    bounded = make_trainer(Bounded(), steps=12, checkpoint={"every": 6}).fit(tmp_path / "bounded")
    assert max(np.abs(x).max() for x in leaves(bounded.state.params)) <= 0.2 + 1e-7


def test_a_task_may_leave_the_optimizer_as_it_is(tmp_path):
    class Unbounded(RegressionTask):
        def final_transform(self):
            return None

    plain = make_trainer(steps=5).fit(tmp_path / "plain")
    same = make_trainer(Unbounded(), steps=5).fit(tmp_path / "same")
    assert_bit_equal(plain.state, same.state)


def test_a_profiler_window_is_written(tmp_path):
    make_trainer(steps=8, profile_from=3, profile_steps=2).fit(tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_model_flops_utilisation_is_recorded_when_the_peak_is_known(tmp_path, monkeypatch):
    from jaxeff.training import loop

    monkeypatch.setattr(loop, "peak_flops", lambda device: 1e9)
    task = RegressionTask()
    task.flops_per_step = lambda: 1e4
    make_trainer(task, steps=10).fit(tmp_path)
    record = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert record["mfu"] == pytest.approx(1e4 / (record["seconds_per_step"] * 1e9), rel=1e-6)


def test_a_workdir_that_is_a_url_is_refused():
    with pytest.raises(CheckpointError, match="is a URL"):
        make_trainer().fit("gs://bucket/run")
