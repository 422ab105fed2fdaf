"""Save and load: a loaded distiller goes on as the original would; the student alone is a plain model."""

import keras
import numpy as np
import pytest
from keras import layers

import jvpreg
from tests.compare import numpy
from tests.distillation.networks import all_losses, batch, distill, student, teacher


@pytest.mark.slow
def test_a_loaded_distiller_trains_on_as_the_original_would(tmp_path):
    x, y = batch()
    losses = [*all_losses(), keras.distillation.LogitsDistillation(2.0)]
    regularizers = [jvpreg.regularizers.JacobianNorm(0.01)]
    distiller = distill(losses, keras.optimizers.Adam(0.001), jacobian_regularizers=regularizers, metrics=["accuracy"])
    fit = {"batch_size": 3, "shuffle": False, "verbose": 0, "validation_data": (x, y)}
    distiller.fit(x, y, **fit)
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.models.load_model(tmp_path / "distiller.keras")
    assert type(loaded) is jvpreg.JacobianDistiller
    assert loaded.get_compile_config() == distiller.get_compile_config()
    configs = [[loss.get_config() for loss in one.matching_losses[:-1]] for one in (loaded, distiller)]
    assert configs[0] == configs[1]
    assert loaded.matching_losses[-1].loss.temperature == 2.0
    assert not loaded.teacher.trainable_variables
    again, theirs = (one.fit(x, y, epochs=2, **fit).history for one in (loaded, distiller))
    assert set(again) == set(theirs)
    assert len(again) == 26
    for name in theirs:
        np.testing.assert_allclose(again[name], theirs[name], rtol=1e-6, err_msg=name)
    for a, b in zip(loaded.get_weights(), distiller.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_the_student_alone_is_a_plain_model(tmp_path):
    x, y = batch()
    distiller = distill(all_losses(), optimizer=1e-4)
    distiller.fit(x, y, verbose=0)
    distiller.student.save(tmp_path / "student.keras")
    loaded = keras.models.load_model(tmp_path / "student.keras")
    assert type(loaded) is keras.Sequential
    assert loaded.count_params() == student().count_params()
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), distiller.predict(x, verbose=0))


def test_a_loaded_model_that_was_not_compiled(tmp_path):
    distiller = jvpreg.JacobianDistiller(teacher(), student(), all_losses(), seed=4, name="distiller")
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.models.load_model(tmp_path / "distiller.keras", compile=False)
    assert (loaded.seed, loaded.name) == (4, "distiller")
    x, _ = batch()
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(distiller(x)))


@pytest.mark.slow
def test_the_teacher_may_have_dropout():
    noisy = keras.Sequential([*teacher().layers[:-1], layers.Dropout(0.5), teacher().layers[-1]])
    noisy.build((None, 8, 8, 2))
    x, y = batch()
    distiller = distill(all_losses(), networks=(noisy, student(normalized=False)))
    first, second = (distiller.fit(x, y, verbose=0).history for _ in range(2))
    # Evaluation is in inference mode, so no dropout mask is drawn.
    np.testing.assert_allclose(first["jacobian_matching"], second["jacobian_matching"], rtol=1e-5)
