"""Optional packages are asked for before anything is computed, with what to install."""

import sys

import keras
import numpy as np
import pytest
from keras import layers

import jvpreg
from jvpreg.callbacks import JacobianPictures, JacobianProbe, JacobianWandbLogger


def probe():
    return JacobianProbe(np.ones((2, 3)), ["frobenius_norm"])


def linear_operator():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    return jvpreg.linearize(model, np.ones((1, 3))).linear_operator()


@pytest.mark.parametrize(
    ("package", "extra", "make"),
    [
        ("matplotlib", "pictures", lambda: JacobianPictures(probe(), folder="pictures")),
        ("tensorboard", "pictures", lambda: JacobianPictures(probe(), log_dir="logs")),
        ("wandb", "wandb", lambda: JacobianWandbLogger(probe())),
        ("matplotlib", "wandb", lambda: JacobianWandbLogger(probe())),
        ("matplotlib", "pictures", lambda: jvpreg.attribution.saliency.figure(np.ones((1, 2, 2, 1)), {})),
        ("scipy", "scipy", linear_operator),
    ],
)
def test_what_is_not_installed_is_told(monkeypatch, package, extra, make):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}\. Install with `pip install jvpreg\[{extra}\]`"):
        make()


def test_pictures_in_files_need_no_tensorboard(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert JacobianPictures(probe(), folder=tmp_path).folder == tmp_path
