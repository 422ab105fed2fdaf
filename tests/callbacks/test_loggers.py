"""What loggers and pictures wrote, read back from their files: TensorBoard's, PNG."""

import io

import keras
import numpy as np
import pytest

import jvpreg
from jvpreg import estimators
from jvpreg.callbacks import JacobianPictures, JacobianProbe
from jvpreg.callbacks.figures import history_png, mean_density
from jvpreg.estimators import Estimate, SpectralDensity
from tests.callbacks.fitting import NeverBegins, data, fit, make_model
from tests.pictures import size


def events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def test_tensorboard_has_the_scalars(tmp_path):
    pytest.importorskip("tensorflow")
    from tensorboard.util import tensor_util

    history = fit(make_model(), JacobianProbe(data(10)[0]), keras.callbacks.TensorBoard(tmp_path), epochs=2).history
    read = events(tmp_path / "train")
    for key in ("jacobian/frobenius_norm", "jacobian/frobenius_norm_sem", "jacobian/spectral_norm"):
        found = [(e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in read.Tensors(f"epoch_{key}")]
        assert found == [(i, pytest.approx(value, rel=1e-5)) for i, value in enumerate(history[key])]


@pytest.mark.slow
def test_tensorboard_has_every_scalar_without_tensorflow_too(tmp_path):
    pytest.importorskip("matplotlib")
    model = make_model(wrapped=True)
    rate = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1))
    x, y = data()

    def part(first, epochs):
        probe = JacobianProbe(data(4)[0], ["frobenius_norm"], every_epochs=2)
        pictures = JacobianPictures(probe, log_dir=tmp_path)
        logs = fit(model, rate, probe, pictures, initial_epoch=first, epochs=epochs, validation_data=(x, y)).history
        assert {"loss", "val_loss", "frobenius_norm_squared", "learning_rate", *probe.keys} <= set(logs)
        return logs

    killed, resumed = part(0, 2), part(1, 3)
    read = events(tmp_path / "jacobian")
    assert set(read.Tags()["scalars"]) == set(killed)
    for key, values in resumed.items():
        found = read.Scalars(key)
        # The epoch that was trained a second time is in the file once.
        assert [event.step for event in found] == [0, 1, 2]
        assert [event.value for event in found] == pytest.approx([killed[key][0], *values], nan_ok=True)


@pytest.mark.slow
def test_pictures_as_files_and_in_tensorboard(tmp_path):
    pytest.importorskip("matplotlib")
    probe = JacobianProbe(data(10)[0], ["frobenius_norm", "spectral_density"], blocks=["first"], every_epochs=2)
    pictures = JacobianPictures(probe, folder=tmp_path / "png", log_dir=tmp_path / "tb")
    fit(make_model(), probe, pictures, epochs=3)
    names = {f"{place}{name}" for place in ("", "block/first/") for name in ("frobenius_norm", "spectral_density")}
    files = {path.name: path.read_bytes() for path in (tmp_path / "png").iterdir()}
    assert set(files) == {f"{name.replace('/', '-')}.png" for name in names}
    read = events(tmp_path / "tb" / "jacobian")
    assert set(read.Tags()["images"]) == {f"jacobian/{name}" for name in names}
    for name in names:
        images = read.Images(f"jacobian/{name}")
        # The first epoch and then every second one is measured, so the third is not.
        assert [image.step for image in images] == [0, 1]
        assert (images[-1].width, images[-1].height) == size(images[-1].encoded_image_string)
        assert images[-1].encoded_image_string == files[f"{name.replace('/', '-')}.png"]


@pytest.mark.slow
def test_pictures_are_drawn_now_and_then_and_at_the_end(tmp_path):
    pytest.importorskip("matplotlib")
    probe = JacobianProbe(data(10)[0], ["frobenius_norm"])
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch == 4))
    model = make_model()
    fit(model, probe, JacobianPictures(probe, log_dir=tmp_path, every_epochs=2), stop, epochs=9)
    assert [image.step for image in events(tmp_path / "jacobian").Images("jacobian/frobenius_norm")] == [1, 3, 4]


@pytest.mark.parametrize("name", ["frobenius_norm", "top_singular_values", "top_eigenvalues", "mine", "density"])
@pytest.mark.parametrize("broken", [None, np.nan, np.inf])
def test_every_picture_can_be_drawn(name, broken):
    """A picture of many epochs or one, of many examples or one, and one of values of which none is finite."""
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for batch, epochs in ((5, [0, 1, 5]), (1, [2])):
        values = [abs(random.normal(size=(batch, 12 if name == "mine" else 3))) for _ in epochs]
        if name == "frobenius_norm":
            values = [value[:, 0] for value in values]
        elif name == "top_eigenvalues":
            values = [value * np.exp(1j * value) for value in values]
        elif name == "density":
            values = [SpectralDensity(np.sort(value), value, value, 0) for value in values]
        if broken is not None:
            values[0] = (
                SpectralDensity(*[part * broken for part in values[0]]) if name == "density" else values[0] * broken
            )
        results = values if name == "density" else [Estimate(value) for value in values]
        png = history_png(f"after/first/{name}", epochs, results)
        pixels = np.asarray(image.open(io.BytesIO(png)).convert("L"))
        assert pixels.shape == size(png)[::-1]
        assert pixels.min() < 100 < 250 < pixels.max()


def test_the_mean_density_is_a_density():
    model = make_model()
    density = estimators.spectral_density(jvpreg.linearize(model, data(10)[0]), num_points=200)
    density = SpectralDensity(*[keras.ops.convert_to_numpy(part) for part in density[:3]], 0)
    points, mean = mean_density(density)
    assert np.trapezoid(mean, points) == pytest.approx(1.0, rel=0.02)
    assert points[-1] == pytest.approx(density.points.max())


def test_what_is_missing_is_told_before_training_begins(tmp_path):
    probe = JacobianProbe(data(4)[0], ["frobenius_norm"])
    with pytest.raises(ValueError, match=r"Expected a path, or `log_dir`. Received: neither"):
        JacobianPictures(probe)
    with pytest.raises(ValueError, match=r"`every_epochs`. Expected an integer, 1 or more. Received: every_epochs=0"):
        JacobianPictures(probe, tmp_path, every_epochs=0)
    with pytest.raises(ValueError, match="`JacobianPictures` reads a `JacobianProbe` that is not in `callbacks`"):
        fit(make_model(), JacobianPictures(probe, tmp_path), NeverBegins())
