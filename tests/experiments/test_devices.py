"""`train --devices=N --hosts.count=N`: the same numbers as on one device, and errors that name the key."""

import functools
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml

from experiments import compare, devices, hosts
from experiments.config import CompareConfig, HostsConfig, ProbeConfig, TrainConfig, as_plain_dict
from experiments.errors import ExperimentError
from experiments.health import study as health
from experiments.health.config import HealthConfig
from tests.experiments import devices as single

BACKEND = keras.backend.backend()
LAYOUTS = {"tensorflow": [None], "jax": [None, {".*kernel": [None, "model"]}], "torch": []}[BACKEND]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path.cwd())}
TWO_HOSTS = HostsConfig(2, 0, "127.0.0.1:1234")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The results of training on two devices and on one, for each layout."""

    @functools.cache
    def trained(layout: str):
        folder = tmp_path_factory.mktemp("devices")
        finished = subprocess.run(
            [sys.executable, "-m", "tests.experiments.devices", str(folder), layout],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        return json.loads((folder / "found.json").read_text())

    return trained


def assert_same(found, expected):
    assert {"jacobian/frobenius_norm", "weight 0"} <= expected.keys() == found.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.slow
@pytest.mark.every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_devices_give_what_one_gives(layout, trained):
    two, one = trained(json.dumps(layout))
    assert_same(two, one)


def hosts_of(config: TrainConfig, tmp_path: Path, *words: str) -> list[subprocess.Popen]:
    """Two processes that train together; `words` are added to the command of the second one."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(as_plain_dict(config)))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
    command = [sys.executable, "-m", "experiments", "train", f"--config={file}", "--hosts.count=2"]
    command += [f"--hosts.address={address}", "--hosts.timeout=30"]
    return [
        subprocess.Popen(
            [*command, f"--hosts.index={index}", *(words if index else [])],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


@pytest.mark.every_backend
@pytest.mark.skipif(BACKEND != "jax", reason="Keras trains on several hosts on JAX only")
def test_two_hosts_give_what_two_devices_of_one_give(trained, tmp_path):
    folder = tmp_path / "run"
    for host in hosts_of(single.config(folder, 1), tmp_path):
        _, errors = host.communicate(timeout=200)
        assert host.returncode == 0, errors[-3000:]
    two, _ = trained("null")
    assert_same(single.numbers(folder), two)


@pytest.mark.every_backend
@pytest.mark.skipif(BACKEND != "jax", reason="Keras trains on several hosts on JAX only")
def test_hosts_tell_the_same_where_one_cannot_do_its_part(tmp_path):
    folder = tmp_path / "run"
    told = []
    for host in hosts_of(single.config(folder, 1), tmp_path, "--jacobian.strength=0.5"):
        _, errors = host.communicate(timeout=200)
        assert host.returncode == 2
        told.append(errors)
    assert told[0] == told[1]
    assert "host 1 was given another command than host 0: jacobian.strength was 0.01 and is now 0.5" in told[0]
    assert not (folder / "config.yaml").exists()


@pytest.mark.every_backend
@pytest.mark.skipif(BACKEND != "jax", reason="Keras trains on several hosts on JAX only")
def test_hosts_that_are_killed_go_on_to_the_bit(request, tmp_path):
    if request.config.getoption("--kills") < 100:
        pytest.skip("three trainings on two hosts: with --kills=100")
    found = {}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        config = replace(single.config(folder, 1), epochs=2, resume="auto")
        if name == "killed":
            running = hosts_of(config, tmp_path)
            while not (folder / "checkpoints" / "backup-00001").exists():
                assert [host.poll() for host in running] == [None, None]
                time.sleep(0.05)
            for host in running:
                host.kill()
                host.communicate()
            assert not (folder / "result.json").exists()
        for host in hosts_of(config, tmp_path):
            _, errors = host.communicate(timeout=300)
            assert host.returncode == 0, errors[-3000:]
        found[name] = single.numbers(folder), (folder / "history.csv").read_text()
    assert found["killed"] == found["whole"]


def test_parts_of_batches_make_the_whole():
    parts = [hosts.part_of_batches(HostsConfig(2, index), 10, 4) for index in range(2)]
    np.testing.assert_array_equal(parts, [[0, 1, 4, 5, 8], [2, 3, 6, 7, 9]])
    np.testing.assert_array_equal(hosts.part_of_batches(HostsConfig(), 10, 4), np.arange(10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 127}, r"--batch_size=127 cannot be divided by --devices=2"),
        ({"probe": ProbeConfig(examples=5)}, r"--probe.examples=5 cannot be divided by --devices=2"),
        ({"devices": 1, "layout": {"kernel": ["model"]}}, r"--layout .*KERAS_BACKEND=jax and --devices=N"),
        ({"layout": {"(": ["model"]}}, r"'\(' is no regular expression"),
        ({"layout": {"kernel": ["rows"]}}, r"null or \"model\". Received: 'rows'"),
        ({"layout": {"kernel": ["model"]}, "hosts": TWO_HOSTS}, r"--layout .*one host. Received: --hosts.count=2"),
        ({"batch_size": 126, "hosts": TWO_HOSTS}, r"--batch_size=126 .*--hosts.count=2 times --devices=2"),
        ({"hosts": HostsConfig(2, 2, "a:1")}, r"--hosts.index=2: expected 0 to 1"),
        ({"hosts": HostsConfig(2)}, r"--hosts.address=None: expected .*HOST:PORT"),
        ({"hosts": HostsConfig(2, address="a")}, r"--hosts.address=a: expected .*HOST:PORT"),
        ({"hosts": HostsConfig(2, address="a:0")}, r"--hosts.address=a:0: expected .*HOST:PORT"),
        ({"hosts": HostsConfig(index=1)}, r"--hosts.index=1 takes several hosts. Expected --hosts.count=N"),
        ({"hosts": HostsConfig(address="a:1")}, r"--hosts.address=a:1 takes several hosts"),
    ],
)
def test_keys_that_do_not_fit(changes, message, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ExperimentError, match=message):
        devices.check(replace(TrainConfig(devices=2), **changes))


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_several_hosts_take_jax(backend, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: backend)
    with pytest.raises(ExperimentError, match=rf"--hosts.count=2 takes KERAS_BACKEND=jax.*'{backend}'"):
        devices.check(TrainConfig(hosts=TWO_HOSTS))


def test_studies_that_train_on_one_host_or_device_say_so():
    several = TrainConfig(hosts=TWO_HOSTS)
    with pytest.raises(ExperimentError, match=r"`compare` trains each model on one host.*--train.hosts.count=2"):
        compare.compare(CompareConfig(several))
    with pytest.raises(ExperimentError, match=r"`health` trains each model on one host"):
        health.STUDY.run(HealthConfig(several))
    with pytest.raises(ExperimentError, match=r"`health` trains on one device. Received: --train.devices=2"):
        health.STUDY.run(HealthConfig(TrainConfig(devices=2)))


def test_torch_is_told_of_its_own_way(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(ExperimentError, match=r"--devices=2: Keras trains on one device on Torch.*many-devices.md"):
        devices.check(TrainConfig(devices=2))
