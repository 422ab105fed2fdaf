"""What a probe measured in an earlier process: kept, read again, and gone on with by pictures and guard."""

import math

import keras
import numpy as np
import pytest

from jvpreg.callbacks import JacobianGuard, JacobianPictures, JacobianProbe
from jvpreg.callbacks.figures import history_png
from jvpreg.callbacks.files import write_whole
from jvpreg.estimators import Estimate, SpectralDensity
from tests.callbacks.fitting import Scale, data, fit, make_model, still_model


def density(lin):
    return SpectralDensity(lin.outputs, lin.outputs**2, lin.outputs / 3, 0)


EVERY_KIND = {
    "file": lambda lin: lin.outputs[:, 0],  # `np.savez` has an argument of this name.
    "complex": lambda lin: keras.ops.cast(lin.outputs, "complex64") * 1j,
    "matrix": lambda lin: lin.outputs[:, :, None],
    "estimate": lambda lin: Estimate(lin.outputs[:, 0], converged=lin.outputs[:, 0] > 0, num_matvecs=1),
    "density": density,
}


class Die(keras.callbacks.Callback):
    """Ends training as a kill at the end of an epoch would, after the callbacks before it and before those after it."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            raise InterruptedError


def assert_same(one, other):
    """Both are of the same class, dtype and value, to the last bit."""
    assert type(one) is type(other)
    assert [part is None for part in one] == [part is None for part in other]
    for left, right in zip(one, other, strict=True):
        assert np.asarray(left).dtype == np.asarray(right).dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.slow
def test_it_is_there_again_after_a_kill(tmp_path):
    def callbacks():
        probe = JacobianProbe(data(4)[0], EVERY_KIND, blocks=["last"], folder=tmp_path / "probe")
        return probe, keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)

    killed, backup = callbacks()
    with pytest.raises(InterruptedError):
        fit(make_model(), killed, Die(2), backup, epochs=4)
    assert list(killed.history) == [0, 1, 2]
    with np.load(tmp_path / "probe" / "epoch-00000.npz") as file:
        # The keys must stay those of files that earlier versions wrote.
        expected = {"value:file", "value:complex", "value:matrix", "value:estimate", "converged:estimate"}
        expected |= {"points:density", "value:density", "sem:density"}
        assert set(file.files) == expected | {key.replace(":", ":block/last/") for key in expected}
    resumed, backup = callbacks()
    logs = fit(make_model(), resumed, backup, epochs=4).history
    # The third epoch was measured and not backed up: it is trained again.
    assert len(logs["loss"]) == 2
    assert list(resumed.history) == [0, 1, 2, 3]
    assert len(resumed.history[0]) == 2 * len(EVERY_KIND)
    for epoch in (0, 1):
        for name, value in killed.history[epoch].items():
            assert_same(resumed.history[epoch][name], value)
        assert resumed.logged(epoch) == killed.logged(epoch)
    assert {key: values[-1] for key, values in logs.items() if key != "loss"} == resumed.logged(3)
    again = callbacks()[0]
    again.restore(4)
    for name, value in resumed.history[2].items():
        assert_same(again.history[2][name], value)


@pytest.mark.slow
def test_a_fit_that_begins_anew_drops_what_was_there(tmp_path):
    probe = JacobianProbe(data(4)[0], ["frobenius_norm"], every_epochs=2, folder=tmp_path)
    model = make_model()
    fit(model, probe, epochs=4)
    assert list(probe.history) == [0, 1, 3]
    fit(model, probe, initial_epoch=3, epochs=4)
    assert list(probe.history) == [0, 1, 3]
    (tmp_path / "epochs.txt").touch()
    fit(model, probe)
    assert list(probe.history) == [0]
    assert {file.name for file in tmp_path.iterdir()} == {"epoch-00000.npz", "epochs.txt"}
    other = make_model()
    fit(other, probe, initial_epoch=1, epochs=2)
    assert list(probe.history) == [0, 1]


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:-40], lambda whole: b"\0" * len(whole)])
def test_a_damaged_file_is_told_and_left_out(tmp_path, damage):
    x = data(4)[0]
    model = make_model()
    fit(model, JacobianProbe(x, ["frobenius_norm"], folder=tmp_path), epochs=3)
    file = tmp_path / "epoch-00001.npz"
    file.write_bytes(damage(file.read_bytes()))
    probe = JacobianProbe(x, ["frobenius_norm"], folder=tmp_path)
    with pytest.warns(UserWarning, match=r"leaves out .*epoch-00001.npz, which is damaged"):
        fit(model, probe, initial_epoch=3, epochs=4)
    assert list(probe.history) == [0, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "metrics"), [(5, ["frobenius_norm"]), (4, ["spectral_norm"])])
def test_what_another_probe_measured_is_told_and_left_out(tmp_path, size, metrics):
    model = make_model()
    fit(model, JacobianProbe(data(4)[0], ["frobenius_norm"], folder=tmp_path))
    probe = JacobianProbe(data(size)[0], metrics, folder=tmp_path)
    with pytest.warns(UserWarning, match=r"leaves out epochs \[1\] of .* other metrics or on another number"):
        fit(model, probe, initial_epoch=1, epochs=2)
    assert list(probe.history) == [1]


@pytest.mark.slow
def test_pictures_of_a_resumed_run_are_those_of_the_whole(tmp_path):
    pytest.importorskip("matplotlib")
    model, x = make_model(), data(4)[0]
    for first in (0, 2):
        probe = JacobianProbe(x, {"density": density}, folder=tmp_path / "probe")
        pictures = JacobianPictures(probe, tmp_path / "pictures")
        fit(model, probe, pictures, initial_epoch=first, epochs=first + 2)
    whole = history_png("density", range(4), [probe.history[epoch]["density"] for epoch in range(4)])
    assert {file.name: file.read_bytes() for file in (tmp_path / "pictures").iterdir()} == {"density.png": whole}


def guarded(folder, **kwargs):
    probe = JacobianProbe(data(4)[0], ["frobenius_norm"], folder=folder)
    return probe, JacobianGuard(probe, **kwargs)


@pytest.mark.slow
def test_the_guard_goes_on_with_the_reference(tmp_path):
    model = still_model()
    healthy = fit(model, *guarded(tmp_path, window=2), epochs=3).history["jacobian/frobenius_norm"]
    probe, guard = guarded(tmp_path, window=2)
    with pytest.warns(UserWarning, match="Epoch 4: .* exploded: .* began in `last`: it stretched .* Training stops"):
        fit(model, probe, guard, Scale("last", {3: 100.0}), initial_epoch=3, epochs=5)
    (event,) = guard.events
    assert (event.kind, event.epoch, event.layer) == ("explosion", 3, "last")
    assert event.reference == np.median(healthy[1:])


@pytest.mark.slow
def test_the_guard_does_not_warn_again_of_what_it_had_seen(tmp_path):
    model = still_model()
    with pytest.warns(UserWarning, match="Epoch 2: .* exploded"):
        fit(model, Scale("last", {1: 100.0}), *guarded(tmp_path, action="warn"), epochs=2)
    probe, guard = guarded(tmp_path, action="warn")
    fit(model, probe, guard, initial_epoch=2, epochs=3)  # A warning would be an error.
    assert guard.events == []
    probe, guard = guarded(tmp_path, action="warn")
    with pytest.warns(UserWarning, match="Epoch 4: .* is not finite: nan against .* began in `last`"):
        fit(model, Scale("last", {3: math.nan}), probe, guard, initial_epoch=3, epochs=4)
    (event,) = guard.events
    assert event.reference == pytest.approx(probe.logged(0)["jacobian/frobenius_norm"])


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_whole(file, b"old")

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_is_told_before_training_begins(tmp_path):
    with pytest.raises(ValueError, match=r"`folder`. Expected a path, or None. Received: folder=3"):
        JacobianProbe(data(4)[0], folder=3)
    (tmp_path / "file").touch()
    probe = JacobianProbe(data(4)[0], ["frobenius_norm"], folder=tmp_path / "file")
    with pytest.raises(FileExistsError):
        fit(make_model(), probe, Die(0))
