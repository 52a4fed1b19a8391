"""The binary as its user meets it: presets, accuracies, epsilon, devices and the environment."""

import json
import os
import pathlib
import subprocess
import sys

import generated
import jax
import numpy as np
import pytest
from commands import QUICK, REPOSITORY

import fedjax_clip as fc
from experiments.config import binary, rundir


def config():
    return json.loads(pathlib.Path("here/config.json").read_text())["config"]


def test_clients_that_diverge_are_said_to_be_dropped(cli):
    code, out, _ = cli(*QUICK, "--client=sgd(1e30)")
    assert code == 0
    assert "rounds: their updates were not finite" in out


def test_devices_wait_for_each_other_longer_than_xla_would_have_them(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one_of_mine=1")
    monkeypatch.setattr(jax, "local_devices", list)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    binary.configure_jax(1)
    patient, _, mine = os.environ["XLA_FLAGS"].rpartition(" ")
    assert "--xla_cpu_collective_call_terminate_timeout_seconds=86400" in patient
    assert mine == "--xla_one_of_mine=1"


def test_what_the_environment_tells_jax_stands(monkeypatch, tmp_path):
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.setattr(jax, "local_devices", list)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    binary.configure_jax(None)
    assert not {"jax_compilation_cache_dir", "jax_num_cpu_devices"} & told.keys()
    binary.configure_jax(2)
    assert told["jax_num_cpu_devices"] == 2
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("FEDJAX_CLIP_CACHE", str(tmp_path))
    binary.configure_jax(None)
    assert told["jax_compilation_cache_dir"] == str(tmp_path / "xla")


def test_a_platform_without_a_device_is_answered_with_a_sentence(monkeypatch):
    def nothing():
        raise AssertionError

    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(jax, "local_devices", nothing)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(fc.InvalidInput, match="no device for JAX_PLATFORMS='cuda': leave it unset"):
        binary.configure_jax(None)


PRESETS = sorted((REPOSITORY / "experiments/presets").glob("*.flags"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_every_preset_opens_with_its_command_time_and_result_and_runs(cli, preset, tmp_path, monkeypatch):
    generated.install(tmp_path / "generated", monkeypatch)
    head = [line for line in preset.read_text().splitlines() if line.startswith("#")]
    assert head[0] == f"# python -m experiments.run --flagfile=experiments/presets/{preset.name}"
    assert head[1].startswith("# Time: ")
    assert "Ends at: " in head[1]
    if preset.stem == "shakespeare_transformer":  # run with shakespeare_lora, which goes on from its model
        return
    if preset.stem == "shakespeare_lora":
        base = preset.with_name("shakespeare_transformer.flags")
        assert cli(f"--flagfile={base}", "--rounds=1", "--cohort_size=2")[0] == 0
    code, out, _ = cli(f"--flagfile={preset}", "--rounds=2", "--cohort_size=2", "--workdir=run")
    assert code == 0
    assert "2 rounds" in out
    if preset.stem == "shakespeare_dialogues":
        samples = json.loads((tmp_path / "run" / "samples.json").read_text())
        assert [len(samples[when]) for when in ("before", "after")] == [1, 1]  # one role of nine is held out
        assert fc.models.pretrained(tmp_path / "run" / "model").model == generated.model().model
        page = (tmp_path / "run" / "report.html").read_text()
        assert "The likeliest tokens, one by one" in page
        assert "The quick brown fox" not in samples["after"][0]["generated"]


def test_a_target_epsilon_is_met_in_the_last_row(cli, tmp_path):
    private = ("--uplink=quantile_clip(0.5, bits_noise=2.0)|gaussian()", "--delta=0.01", "--sampler=poisson")
    code, out, _ = cli(*QUICK, *private, "--target_epsilon=5", "--workdir=run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert code == 0
    assert " at delta 0.01, of this run" in out
    spent = [row["epsilon"] for row in rows]
    assert spent == sorted(spent)
    assert 4.99 < spent[-1] <= 5
    assert "ended early" not in out

    noise = ("--uplink=clip_by_global_norm(0.5)|gaussian(4.0)", "--delta=0.01", "--sampler=poisson")
    code, out, _ = cli(*QUICK, *noise, "--target_epsilon=0.28", "--workdir=short")
    assert code == 0
    assert "ended early        after 2 of 3 rounds: one more round would pass --target_epsilon=0.28" in out


def test_only_what_is_sent_is_accounted_for_on_a_grid(cli, tmp_path):
    """On a coarse grid epsilon depends on how many parameters there are; the slope stays with its client."""
    private = ("--algorithm=partially_private('kernel')", "--uplink=clip_by_global_norm(1.0)|skellam(0.4, 8)")
    code, out, err = cli(
        *QUICK, *private, "--client=sgd(0.1)|clip_by_global_norm(1.0)", "--delta=0.01", "--workdir=run"
    )
    assert code == 0
    assert "who sees the sums of all rounds, but no message and not who took part" in out
    assert "--client: clip_by_global_norm stands behind the optimiser and bounds its steps" in err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    link = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.skellam(0.4, 8))
    reducer = fc.reduce.modular_sum(3)
    one, two = (fc.privacy.distributed(link, np.zeros(size), reducer) for size in (1, 2))
    sampler = fc.data.sampling.uniform(3)
    assert rows[0]["epsilon"] == pytest.approx(fc.privacy.epsilon(one, sampler, 6, 1, 0.01))
    assert rows[0]["epsilon"] != pytest.approx(fc.privacy.epsilon(two, sampler, 6, 1, 0.01), rel=1e-4)


def test_linear_regression_ends_near_two_and_one(cli):
    code, _, _ = cli(f"--flagfile={REPOSITORY}/experiments/presets/linear_regression.flags", "--workdir=here")
    assert code == 0
    with np.load("here/params.npz") as params:
        np.testing.assert_allclose(params["params/Dense_0/kernel"], [[2]], atol=0.05)
        np.testing.assert_allclose(params["params/Dense_0/bias"], [1], atol=0.05)


def test_two_nodes_meet_at_their_joint_optimum(cli):
    assert cli(f"--flagfile={REPOSITORY}/experiments/presets/two_nodes.flags", "--workdir=here")[0] == 0
    with np.load("here/params.npz") as params:
        np.testing.assert_allclose(params["w"], 1, atol=1e-3)


def test_the_default_run_reaches_its_accuracies(cli):
    assert cli("--workdir=here")[0] == 0
    last = rundir.RunDirectory("here", config()).rows()[-1]
    assert last["eval/examples/accuracy"] > 0.95
    assert last["eval/clients/accuracy"] > 0.90


def test_a_tfds_data_set_with_natural_clients_trains_without_a_network(cli, tmp_path, monkeypatch):
    from digits_tfds import build_digits_tfds

    monkeypatch.setenv("FEDJAX_CLIP_CACHE", str(tmp_path / "cache"))
    build_digits_tfds(tmp_path / "tfds")
    task = f"--task=tfds('fedjax_digits', data_dir={str(tmp_path / 'tfds')!r}, by='client_id')"
    code, out, err = cli(task, "--rounds=2", "--workdir=here")
    assert code == 0, err
    assert "11 clients" in err
    assert "held-out clients" in out


@pytest.mark.parametrize("binary", ["run", "sweep", "report", "bench.clip"])
def test_a_binary_needs_none_of_the_extras_that_its_flags_do_not_name(binary):
    extras = ["cryptography", "dp_accounting", "jax_privacy", "pandas", "tenseal", "tensorflow_datasets"]
    code = f"import runpy, sys\nfor name in {extras}: sys.modules[name] = None\n"
    code += f"sys.argv = ['binary', '--help']\nrunpy.run_module('experiments.{binary}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode in (0, 1), done.stderr
    assert "--" in done.stdout
    assert "Traceback" not in done.stderr
