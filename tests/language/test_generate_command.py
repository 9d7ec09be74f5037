"""The command: runs and checkpoints in, text out, and a clear line for every mistake."""

import dataclasses
import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff.generate import (
    Settings,
    complete,
    load_checkpoint,
    load_run,
    main,
    stop_tokens,
    stream_text,
)
from jaxeff.language import ByteTokenizer, Decoder, SamplingConfig, generate, preset, save_hf
from jaxeff.training import CheckpointConfig, CheckpointError, Checkpoints, ConfigError, TrainState

CONFIG = preset("tiny", hidden_size=32, intermediate_size=48, max_position_embeddings=40)
PLAIN = Settings(12, SamplingConfig(), seed=4)


def random_params(seed):
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(Decoder(CONFIG).init)(jax.random.key(seed), tokens)["params"]
    return jax.tree.map(lambda x: x if x.ndim == 1 else x * 8, nn.meta.unbox(params))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    run_config = {
        "task": "language_model",
        "model": dataclasses.asdict(CONFIG),
        "data": {"tokenizer": "bytes"},
    }
    checkpoints = Checkpoints(folder, CheckpointConfig(), run_config)
    for step in (1, 2):
        state = TrainState.create(random_params(step), {}, optax.identity(), seed=0)
        checkpoints.save(state.replace(step=jnp.asarray(step)), data={}, controller={})
    checkpoints.close()
    (folder / "config.json").write_text(json.dumps(run_config))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The parameters of step 2 as a Hugging Face folder, without a tokenizer file."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_hf(folder, CONFIG, random_params(2), extra={"eos_token_id": 257})
    return folder


class TestRun:
    def test_it_continues_with_the_newest_parameters(self, workdir):
        prompt = ByteTokenizer().encode("ab", add_bos=True)
        out = generate(
            random_params(2),
            CONFIG,
            prompt[None],
            np.asarray([3]),
            max_new_tokens=12,
            key=jax.random.key(4),
            eos_ids=(257,),
        )
        expected = ByteTokenizer().decode(out.tokens[0, : int(out.lengths[0])])
        assert complete(load_run(workdir), ["ab"], PLAIN) == [expected]

    def test_an_older_step_can_be_named(self, workdir):
        older = complete(load_run(workdir, step=1), ["ab"], PLAIN)
        assert older != complete(load_run(workdir), ["ab"], PLAIN)

    def test_the_config_and_the_stop_token_are_those_of_the_run(self, workdir):
        model = load_run(workdir)
        assert model.config == CONFIG
        assert (model.eos_ids, model.add_bos) == ((257,), True)

    def test_another_dtype_casts_parameters_and_computation(self, workdir):
        model = load_run(workdir, dtype="bfloat16")
        assert model.config.dtype == "bfloat16"
        assert {x.dtype.name for x in jax.tree.leaves(model.params)} == {"bfloat16"}

    def test_what_is_missing_is_named(self, workdir, tmp_path):
        with pytest.raises(FileNotFoundError, match="no run at"):
            load_run(tmp_path / "none")
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            load_run(tmp_path)
        (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
        with pytest.raises(CheckpointError, match="no checkpoint under"):
            load_run(tmp_path)
        with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
            load_run(workdir, step=7)
        (tmp_path / "config.json").write_text('{"task": "image_model"}')
        with pytest.raises(ConfigError, match="no language model"):
            load_run(tmp_path)
        run = {"task": "synthetic_sequences", "model": {"width": 8}, "data": {"task": "parity"}}
        (tmp_path / "config.json").write_text(json.dumps(run))
        with pytest.raises(ConfigError, match="no language model"):
            load_run(tmp_path)


class TestCheckpoint:
    def test_it_continues_as_the_run_it_was_saved_from(self, workdir, checkpoint):
        model = load_checkpoint(checkpoint, tokenizer="bytes")
        ours = complete(model, ["ab"], PLAIN)
        assert ours == complete(load_run(workdir), ["ab"], PLAIN)

    def test_stop_tokens_are_those_of_every_file(self, checkpoint, tmp_path):
        assert stop_tokens(checkpoint, ByteTokenizer()) == (257,)
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 4]}')
        (tmp_path / "config.json").write_text('{"eos_token_id": null}')
        assert stop_tokens(tmp_path, ByteTokenizer()) == (4, 9, 257)

    def test_a_missing_tokenizer_is_named(self, checkpoint):
        with pytest.raises(FileNotFoundError, match="no tokenizer file at"):
            load_checkpoint(checkpoint)


class TestText:
    def test_the_stream_makes_up_the_text(self, workdir):
        model = load_run(workdir)
        pieces = list(stream_text(model, "ab", PLAIN))
        assert "".join(pieces) == complete(model, ["ab"], PLAIN)[0]
        assert len(pieces) > 1

    def test_greedy_batches_equal_single_prompts(self, workdir):
        model, greedy = load_run(workdir), Settings(8, SamplingConfig(temperature=0.0))
        together = complete(model, ["a", "longer"], greedy)
        assert together == [complete(model, [text], greedy)[0] for text in ("a", "longer")]

    def test_an_empty_prompt_starts_from_bos(self, workdir):
        assert complete(load_run(workdir), [""], PLAIN)[0]

    def test_too_long_and_empty_prompts_are_refused(self, workdir):
        model = load_run(workdir)
        with pytest.raises(ValueError, match=r"prompt 2 has 41 tokens, more than .*=40"):
            complete(model, ["a", "b" * 40], PLAIN)
        with pytest.raises(ValueError, match="prompt 1 is empty"):
            complete(dataclasses.replace(model, add_bos=False), [""], PLAIN)


class TestCommand:
    def run(self, capsys, *arguments):
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    def test_one_prompt_is_printed_with_its_continuation(self, workdir, capsys):
        arguments = ("--workdir", workdir, "--prompt", "ab", "--max_new_tokens", 12, "--seed", 4)
        status, out, err = self.run(capsys, *arguments)
        assert (status, err) == (0, "")
        assert out == "ab" + complete(load_run(workdir), ["ab"], PLAIN)[0] + "\n"

    def test_several_prompts_are_printed_one_after_another(self, workdir, capsys, tmp_path):
        file = tmp_path / "prompts.txt"
        file.write_text("one\n\nzwei\n")
        settings = ("--max_new_tokens", 5, "--greedy")
        status, out, _ = self.run(capsys, "--workdir", workdir, "--prompt_file", file, *settings)
        expected = complete(
            load_run(workdir), ["one", "zwei"], Settings(5, SamplingConfig(temperature=0.0))
        )
        assert status == 0
        assert out == f"=== 1 of 2\none{expected[0]}\n\n=== 2 of 2\nzwei{expected[1]}\n\n"
        repeated = ("--prompt", "one", "--prompt", "zwei")
        assert self.run(capsys, "--workdir", workdir, *repeated, *settings)[1] == out

    def test_a_checkpoint_is_read(self, checkpoint, workdir, capsys):
        common = ("--prompt", "ab", "--max_new_tokens", 6, "--top_k", 5, "--top_p", 0.9)
        ours = self.run(capsys, "--hf", checkpoint, "--tokenizer", "bytes", *common)
        assert ours == self.run(capsys, "--workdir", workdir, *common)

    def test_texts_beyond_the_positions_are_noted(self, workdir, capsys):
        status, _, err = self.run(
            capsys, "--workdir", workdir, "--prompt", "ab", "--max_new_tokens", 38, "--greedy"
        )
        assert status == 0
        assert "texts of up to 41 tokens go beyond the model's max_position_embeddings=40" in err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--workdir", "none", "--prompt", "a"), "no run at none"),
            (("--hf", "none", "--prompt", "a"), "no checkpoint folder at none"),
            (("--hf", "none", "--prompt", "a", "--step", 1), "--step names a checkpoint of a run"),
            (("--workdir", "none", "--prompt", "a", "--top_p", 0), "top_p=0.0 must be in (0, 1]"),
            (("--workdir", "none", "--prompt", "a", "--max_new_tokens", 0), "max_new_tokens=0"),
            (("--workdir", "none", "--prompt_file", "none.txt"), "no prompt file at none.txt"),
        ],
    )
    def test_mistakes_end_with_one_line(self, arguments, message, capsys):
        status, out, err = self.run(capsys, *arguments)
        assert (status, out) == (1, "")
        assert err.startswith("error: ") and message in err and err.count("\n") == 1

    @pytest.mark.parametrize(
        "arguments", [["--prompt", "a"], ["--workdir", "x"], ["--workdir", "x", "--hf", "y"]]
    )
    def test_a_source_and_a_prompt_are_required(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "usage: python -m jaxeff.generate" in capsys.readouterr().err

    def test_it_runs_as_a_module(self, workdir):
        command = [sys.executable, "-m", "jaxeff.generate", "--workdir", str(workdir)]
        done = subprocess.run(
            [*command, "--prompt", "é", "--max_new_tokens", "3", "--greedy"],
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": "utf-8"},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode().startswith("é")
