"""`JacobianProgbarLogger`: what a person reads in the terminal."""

import keras
import pytest

from jvpreg.callbacks import JacobianProbe, JacobianProgbarLogger
from jvpreg.callbacks.progress import lines
from tests.callbacks.fitting import NeverBegins, data, fit, make_model


@pytest.mark.parametrize("verbose", [1, 2])
def test_the_bar_is_keras_own_and_the_jacobian_stands_beneath(capfd, verbose):
    x, labels = data(6)
    metrics = {"frobenius_norm": "frobenius_norm", "own": lambda lin: lin.outputs[:, 0]}
    probe = JacobianProbe(x, metrics, blocks=["last"], labels=labels * 0 + 2, every_epochs=3, every_batches=1)
    history = fit(make_model(), probe, JacobianProgbarLogger(probe), epochs=3, verbose=verbose).history
    printed = capfd.readouterr().out
    assert "jacobian/" not in printed
    # Keras writes the bar over and over in one line; the lines of the probe are indented.
    told = [line for line in printed.splitlines() if line.startswith("    ")]
    starts = ["    ‖J‖ ", "    class_2: ‖J‖ ", "    block/last: ‖J‖ ", "    class_2/block/last: ‖J‖ "]
    assert [line[: line.index("J") + 3] for line in told] == 2 * starts  # The second epoch is not measured.
    value, sem = (history[f"jacobian/frobenius_norm{end}"][2] for end in ("", "_sem"))
    assert float(told[4].split()[1].split("±")[0]) == pytest.approx(value, abs=sem / 10)
    assert float(told[4].split()[1].split("±")[1]) == pytest.approx(sem, rel=0.05)
    assert "  own " in told[0]
    assert printed.count("loss: ") >= 3
    assert {"loss", *probe.keys} == set(history)


@pytest.mark.slow
def test_silence_is_silence(capfd):
    probe = JacobianProbe(data(6)[0], ["frobenius_norm"])
    fit(make_model(), probe, JacobianProgbarLogger(probe), verbose=0)
    keras.config.disable_interactive_logging()
    try:
        fit(make_model(), probe, JacobianProgbarLogger(probe), verbose=2)
    finally:
        keras.config.enable_interactive_logging()
    assert capfd.readouterr().out == ""


def logged(**numbers):
    return {f"p/{key}": value for key, value in numbers.items()}


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"frobenius_norm": 0.62134, "frobenius_norm_sem": 0.01849}, "‖J‖ 0.621±0.018"),
        ({"spectral_norm": 4.0, "spectral_norm_sem": float("nan")}, "σ₁ 4"),
        ({"spectral_norm": float("nan"), "spectral_norm_sem": float("nan")}, "σ₁ nan"),
        ({"trace": 1234.5, "trace_sem": 321.0}, "tr J 1234±321"),
        ({"trace": 2.5e9, "trace_sem": 1e7}, "tr J 2.5e+09±1e+07"),
        ({"mine": 0.0, "mine_sem": 3e-9}, "mine 0±3e-09"),
        ({"m_1": 2.0, "m_1_sem": 0.1, "m_2": 1.0, "m_2_sem": 0.1, "m_converged": 1.0}, "m_1 2.00±0.10  m_2 1.00±0.10"),
        (
            {"singular_values_12": 2.0, "singular_values_12_sem": 0.1, "singular_values_converged": 0.98},
            "σ₁₂ 2.00±0.10 (2 % unconverged)",
        ),
        (
            {
                f"{name}{end}": value
                for name in ("spectral_norm", "top_singular_values_1", "top_singular_values_2")
                for end, value in (("", 2.0), ("_sem", 0.1))
            },
            "σ₁ 2.00±0.10  σ₂ 2.00±0.10",
        ),
        # A metric whose own name ends like the flags of convergence.
        ({"m_converged": 0.5, "m_converged_sem": 0.1}, "m_converged 0.50±0.10"),
        (
            {"e_1_abs": 2.0, "e_1_abs_sem": 0.1, "e_1_imag": 1.0, "e_1_imag_sem": 0.1, "e_converged": 0.5},
            "e_1_abs 2.00±0.10  e_1_imag 1.00±0.10 (50 % unconverged)",
        ),
    ],
)
def test_a_number_and_its_error(numbers, told):
    assert lines(logged(**numbers), "p") == [f"    {told}"]


def test_a_line_is_not_longer_than_the_terminal():
    names = [f"block/a_block_with_a_name/top_singular_values_{i}" for i in range(1, 12)]
    numbers = {f"p/{name}{end}": value for name in names for end, value in (("", 1234.5), ("_sem", 0.01))}
    found = lines(numbers, "p")
    assert len(found) == 3
    assert all(60 < len(line) <= 100 for line in found[:-1])
    assert found[0].startswith("    block/a_block_with_a_name: σ₁ 1234.500±0.010  σ₂ ")
    assert " ".join(found).split()[1::2] == [
        f"σ{i}".translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")) for i in range(1, 12)
    ]


def test_it_stands_after_its_probe():
    probe = JacobianProbe(data(4)[0], ["frobenius_norm"])
    with pytest.warns(UserWarning, match="JacobianProgbarLogger stands before JacobianProbe .* Swap them"):
        fit(make_model(), JacobianProgbarLogger(probe), probe)
    with pytest.raises(ValueError, match="`JacobianProgbarLogger` reads a `JacobianProbe` that is not in `callbacks`"):
        fit(make_model(), JacobianProgbarLogger(probe), NeverBegins())
    with pytest.raises(ValueError, match=r"`probe`. Expected a `JacobianProbe`. Received: probe=None"):
        JacobianProgbarLogger(None)
