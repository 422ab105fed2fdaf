"""Figures: maps beside their images, and sentences coloured by what each token contributes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from jvpreg.attribution.decomposition import FullJacobian
from jvpreg.common import checks
from jvpreg.common.typing import ArrayLike


def figure(images: ArrayLike, maps: Mapping[str, Any], titles: Sequence[str] | None = None) -> Any:
    """Lays out images and their maps as in table 5 of the paper: a row for each image, a column for each method.

    Args:
        images: `(B, H, W, C)` in [0, 1], of one channel or three.
        maps: a dict from a column's heading to maps `(B, H, W)`. Their absolute values are shown, each up to its 99th
            percentile.
        titles: a label for each row.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: matplotlib is not installed.

    Reference: Srinivas & Fleuret (2018), table 5.
    """
    checks.packages("saliency.figure", "pictures", "matplotlib")
    from matplotlib.figure import Figure

    images = ops.convert_to_numpy(images)
    rows, columns = len(images), 1 + len(maps)
    page = Figure(figsize=(1.5 * columns, 1.5 * rows + 0.3), layout="constrained")
    grid = page.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for row, image in enumerate(images):
        grid[row, 0].imshow(np.squeeze(image), cmap="gray", vmin=0.0, vmax=1.0)
        grid[row, 0].set_ylabel(titles[row] if titles else "")
        for column, salient in enumerate(maps.values(), start=1):
            shown = np.abs(ops.convert_to_numpy(salient)[row])
            grid[row, column].imshow(shown, cmap="magma", vmin=0.0, vmax=np.percentile(shown, 99) or 1.0)
    for axes, heading in zip(grid[0], ["image", *maps], strict=True):
        axes.set_title(heading.replace(" ", "\n", 1), fontsize=9)
    return page


WIDTH = 84  # characters of a line of text
POINTS_OF_A_CHARACTER = 6.62  # of DejaVu Sans Mono, which comes with matplotlib, at 11 points
LINE = 34.0  # points from a line of tokens to the next


def token_figure(
    tokens: Sequence[Sequence[str]], full: FullJacobian, title: str = "What each token contributes to the output"
) -> Any:
    """Colours each sentence by what its tokens contribute to the output, and writes the whole sum under it.

    The contribution of a token is the gradient times its embedding. With the intercepts of the layers after the
    embedding, which the figure has as one number for each kind, the contributions sum to the output exactly.

    Args:
        tokens: for each example its tokens, T strings at most. If they are fewer, the other positions are drawn as one
            box, "rest", unless they contribute nothing, as padding under a mask does.
        full: what `jvpreg.full_jacobian(model, ids, at="embedding")` returned, for embeddings `(B, T, E)`.
        title: over the figure.

    Returns:
        A `matplotlib.figure.Figure`. Red tokens raise the output, blue ones lower it; all sentences have one scale.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are not as many sentences as examples, or one has more tokens than positions.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,), dtype="int32"), keras.layers.Embedding(9, 4, name="embedding"),
    ...     keras.layers.LSTM(3), keras.layers.Dense(2)])
    >>> full = jvpreg.full_jacobian(model, np.array([[1, 2, 3]]), at="embedding")
    >>> page = jvpreg.attribution.saliency.token_figure([["not", "so", "bad"]], full)
    >>> page.savefig("sentence.png")  # doctest: +SKIP
    """
    checks.packages("saliency.token_figure", "pictures", "matplotlib")
    rows = _contributions(tokens, full)
    sums = _sums(full, [sum(number for _, number in row) for row in rows])
    return _page([_lines(row) for row in rows], sums, title)


def _page(lines: list, sums: list[str], title: str) -> Any:
    """Draws sentences, each in several lines and with its sum under it, and one colour bar for all of them."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import CenteredNorm
    from matplotlib.figure import Figure

    # A line for each line of tokens, one for the sum, and half a line between sentences.
    height = LINE * sum(len(of_sentence) + 1.0 for of_sentence in lines)
    size = (WIDTH * POINTS_OF_A_CHARACTER + 70, height + 50)
    page = Figure(figsize=(size[0] / 72, size[1] / 72))
    axes = page.add_axes((10 / size[0], 10 / size[1], WIDTH * POINTS_OF_A_CHARACTER / size[0], height / size[1]))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    numbers = [abs(number) for of_sentence in lines for line in of_sentence for _, number, _ in line]
    largest = max((number for number in numbers if np.isfinite(number)), default=0.0) or 1.0
    colors = ScalarMappable(CenteredNorm(halfrange=largest), "RdBu_r")
    top = 0.0
    for of_sentence, written in zip(lines, sums, strict=True):
        for line in of_sentence:
            _draw_line(axes, line, top, colors)
            top += LINE
        axes.text(0, top + 2, written, va="top", fontsize=8.5, color="0.2")
        top += LINE
    bar_height = min(height, 140.0)
    bar_height = max(bar_height - 20, 20.0)  # without what is written over it and under it
    bar = page.add_axes((1 - 52 / size[0], (height - bar_height) / size[1], 9 / size[0], bar_height / size[1]))
    page.colorbar(colors, cax=bar)
    bar.tick_params(labelsize=7)
    bar.set_title("raises the output", fontsize=7, loc="center")
    bar.set_xlabel("lowers it", fontsize=7)
    page.suptitle(title, x=10 / size[0], y=1 - 12 / size[1], ha="left", va="top", fontsize=11)
    return page


def _contributions(tokens: Sequence[Sequence[str]], full: FullJacobian) -> list[list[tuple[str, float]]]:
    """For each sentence its tokens, each with what it contributes."""
    gradient = full.input_jacobian
    if not hasattr(gradient, "shape") or len(gradient.shape) != 3:
        raise checks.invalid("full", "the full-Jacobian at embeddings (B, T, E), by `at=`", full.inputs)
    products = ops.convert_to_numpy(gradient) * np.asarray(ops.convert_to_numpy(full.inputs))
    parts = np.sum(products, axis=-1, dtype="float64")
    if isinstance(tokens, str) or len(tokens) != len(parts) or any(isinstance(row, str) for row in tokens):
        raise checks.invalid("tokens", f"a list of tokens for each of the {len(parts)} examples", tokens)
    if max(map(len, tokens)) > parts.shape[1]:
        raise checks.invalid("tokens", f"at most {parts.shape[1]} tokens for each example", tokens)
    rows = []
    for words, numbers in zip(tokens, parts, strict=True):
        row = [(str(word), float(number)) for word, number in zip(words, numbers, strict=False)]
        if np.any(numbers[len(words) :] != 0):
            row.append(("rest", float(numbers[len(words) :].sum())))
        rows.append(row)
    return rows


def _sums(full: FullJacobian, totals: Sequence[float]) -> list[str]:
    """For each sentence its sum, written out."""
    kinds = {"bias": "biases", "normalization": "normalizations", "other": "other intercepts"}
    known = [kind for kind in kinds if kind in full.sources.values()]
    outputs = ops.convert_to_numpy(full.target_output)
    parts = {kind: ops.convert_to_numpy(full.from_biases(kind)) for kind in known}  # type: ignore[arg-type]
    return [
        "sum:  "
        + "  ".join([f"tokens {_signed(total, 3)}", *(f"{kinds[k]} {_signed(parts[k][i], 3)}" for k in known)])
        + f"  =  output {_signed(outputs[i], 3)}"
        for i, total in enumerate(totals)
    ]


def _signed(number: float, digits: int) -> str:
    return f"{number:+.{digits}f}".replace("-", "−")


def _lines(row: list[tuple[str, float]]) -> list[list[tuple[str, float, int]]]:
    """Tokens, each with its number and the width of its box in characters, in lines of `WIDTH` at most."""
    lines: list[list[tuple[str, float, int]]] = [[]]
    for word, number in row:
        shown = word if len(word) <= WIDTH - 2 else word[: WIDTH - 3] + "…"
        width = max(len(shown), 5) + 1
        if lines[-1] and sum(used for _, _, used in lines[-1]) + width > WIDTH:
            lines.append([])
        lines[-1].append((shown, number, width))
    return lines


def _draw_line(axes: Any, line: list[tuple[str, float, int]], top: float, colors: Any) -> None:
    """Draws a line of tokens, with their numbers under them, at a height in points from the top."""
    from matplotlib.patches import Rectangle

    left = 0
    for word, number, width in line:
        color = colors.to_rgba(number)
        axes.add_patch(Rectangle((left + 0.1, top), width - 0.2, 19, facecolor=color, edgecolor="0.8", linewidth=0.5))
        # White on dark colours, by their luminance.
        light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 0.55
        style = {"ha": "center", "va": "center", "family": "DejaVu Sans Mono", "fontsize": 11}
        # A dollar sign would begin a formula.
        axes.text(left + width / 2, top + 9.5, word, color="black" if light else "white", parse_math=False, **style)
        axes.text(left + width / 2, top + 21, _signed(number, 2), ha="center", va="top", fontsize=6.5, color="0.35")
        left += width
