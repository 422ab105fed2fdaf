"""The convergence study: its figures show what the estimators and the exact values say."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

import jvpreg
from experiments.__main__ import main, parse
from experiments.errors import ExperimentError
from experiments.estimators import convergence, study
from experiments.estimators.config import EstimatorsConfig
from experiments.estimators.monte_carlo import trace_errors, trajectories
from experiments.studies import STUDIES

CONFIGS = Path(__file__).parents[2] / "configs"
METHODS = ["hutchinson", "hutch++", "xtrace"]

pytestmark = pytest.mark.skipif(keras.backend.backend() == "torch", reason="the study is run on TensorFlow and JAX")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return EstimatorsConfig(
        image_size=4,
        examples=2,
        block=3,
        block_examples=1,
        steps=[1, 2, 4],
        single_steps=5,
        timed_examples=1,
        num_probes=20,
        trajectories=2,
        trace_dimension=40,
        trace_matvecs=[12, 24],
        trace_seeds=60,
        folder=str(tmp_path_factory.mktemp("estimators")),
    )


@pytest.fixture(scope="module")
def summary(config):
    return study.STUDY.run(config)


@pytest.mark.slow
def test_the_files_say_the_same(summary, config):
    folder = Path(config.folder)
    assert json.loads((folder / "estimators.json").read_text()) == json.loads(json.dumps(summary))
    assert (folder / "figure4.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "trace.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "estimators.md").read_text()
    assert summary["machine"]["processor"] in text
    assert "frobenius_norm, 100 probes" in text


def test_the_iterations_converge_and_materialized_steps_are_left_out(summary):
    curves = summary["figure4"]["convergence"]
    assert [(curve["kind"], curve["k"]) for curve in curves] == [
        ("singular", 1),
        ("singular", 3),
        ("eigen", 1),
        ("eigen", 3),
    ]
    single = curves[0]
    assert single["steps"] == [1, 2, 4, 5]
    assert np.median(single["ours"][-1]) < np.median(single["ours"][0])
    assert np.median(single["ours"][-1]) < np.median(single["paper"][-1])
    # The Jacobian has 48 dimensions. The 2 · 3 · 4 products of 4 steps are fewer; with 8 steps they would not be.
    assert curves[1]["ours_steps"] == [1, 2, 4]
    for curve in curves:
        assert len(curve["ours"]) == len(curve["reported"]) == len(curve["ours_steps"])
        assert all(len(errors) == curve["examples"] for errors in (*curve["ours"], *curve["paper"]))


def test_the_paper_s_iterations_find_the_values_of_a_symmetric_matrix():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, use_bias=False)])
    model.set_weights([study.symmetric(2.0 ** -np.arange(8), seed=0).astype("float32")])
    lin = jvpreg.linearize(model, np.zeros((1, 8), "float32"))
    for iterations in (convergence.paper_singular_values, convergence.paper_eigenvalues):
        found = keras.ops.convert_to_numpy(iterations(lin, 3, 20, 0)[-1])
        np.testing.assert_allclose(found, [[1.0, 0.5, 0.25]], rtol=1e-5)


def test_trajectories_end_where_theory_says(summary):
    model = keras.Sequential([keras.Input((30,)), keras.layers.Dense(20, use_bias=False)])
    lin = jvpreg.linearize(model, np.zeros((4, 30), "float32"))
    matrix = np.float64(keras.ops.convert_to_numpy(lin.jacobian()))[0]
    found = trajectories(lin, matrix, num_probes=50, counted=300, seed=0)
    assert found["exact"] == pytest.approx(np.linalg.norm(matrix))
    np.testing.assert_allclose(found["spread"], found["sem"], rtol=0.25)
    paths = np.array(found["trajectories"])
    assert paths.shape == (4, 50)
    assert np.all(np.abs(paths[:, -1] - found["exact"]) < 4 * found["sem"][-1])
    directions = jvpreg.probes.draw("sphere", lin.inputs[0], 50, 0)
    products = keras.ops.convert_to_numpy(lin.jvp(directions))
    assert paths[1, 2] == pytest.approx(np.sqrt(np.mean(np.sum(products[:3, 1] ** 2, axis=-1))), rel=1e-5)


def test_a_spectrum_that_decays_is_for_hutch_plus_plus_and_xtrace_and_a_flat_one_is_not():
    decaying = study.symmetric(1.0 / np.arange(1, 81) ** 2, seed=0)
    flat = study.symmetric(np.linspace(3.0, 1.0, 80), seed=0)
    found = trace_errors(decaying, [24], num_seeds=200, seed=0)
    assert found["trace"] == pytest.approx(np.sum(1.0 / np.arange(1, 81) ** 2))
    assert list(found["methods"]) == METHODS
    hutchinson, hutch_plus_plus, xtrace = (found["methods"][method][0] for method in METHODS)
    assert 4 * xtrace["error"] < hutchinson["error"]
    assert 4 * hutch_plus_plus["error"] < hutchinson["error"]
    assert hutchinson["sem_over_spread"] == pytest.approx(1.0, abs=0.15)
    for row in (hutchinson, hutch_plus_plus, xtrace):
        assert abs(row["bias"]) < 4 * row["bias_sem"]
        assert row["relative_error"] == pytest.approx(row["error"] / found["trace"])
        assert row["matvecs"] == 24
    found = trace_errors(flat, [24], num_seeds=200, seed=0)
    hutchinson, hutch_plus_plus, _ = (found["methods"][method][0] for method in METHODS)
    assert hutchinson["error"] < hutch_plus_plus["error"]


def test_the_table_has_a_row_for_every_step(summary):
    heading, rows = study.convergence_rows(summary["figure4"]["convergence"])
    assert [row[0] for row in rows] == ["1", "2", "4", "5"]
    assert all(len(row) == len(heading) for row in rows)


def test_the_configuration_is_valid_and_misfits_are_told(capsys):
    _, config = parse("experiments", STUDIES, ["estimators", f"--config={CONFIGS / 'estimators.yaml'}", "--block=5"])
    assert (config.block, config.timed_examples) == (5, 100)
    for wrong in ({"image_size": 10}, {"block_examples": 9, "examples": 2}, {"image_size": 4, "block": 47}):
        with pytest.raises(ExperimentError, match=next(iter(wrong)) if len(wrong) == 1 else "block"):
            study.check(EstimatorsConfig(**wrong))
    assert main(["estimators", "--blokc=3"]) == 2
    assert "blokc" in capsys.readouterr().err
