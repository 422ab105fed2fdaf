"""Pairs of layers, one of the teacher and one of the student, whose maps are matched."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from keras import layers

from jvpreg.attribution.decomposition import NORMALIZATIONS
from jvpreg.common import checks
from jvpreg.engine.node import Node
from jvpreg.linearization import Linearization

Kind = Literal["outputs", "maps", "biases"]


@dataclass(frozen=True)
class Site:
    """A layer, or a block of them, as a loss sees it.

    Attributes:
        path: of the layer.
        nodes: names of its nodes, in the order in which they ran.
        channel_axis: of the nodes' outputs, `(B, …)`.
        sizes: of the positions: the shape of the last output without batch and channels.
    """

    path: str
    nodes: tuple[str, ...]
    channel_axis: int
    sizes: tuple[int, ...]


class LayerPairs:
    """The pairs that a loss was given, to be found in two networks.

    Args:
        layers: pairs of paths, `(teacher_layer, student_layer)`, or `"auto"`.
        kind: what is seen of a layer: `"outputs"`, its outputs as they are; `"maps"`, a map of its outputs; or
            `"biases"`, a map of its bias-Jacobians.
        owner: the loss's class, for messages.

    Raises:
        ValueError: `layers` is neither.
    """

    def __init__(self, layers: Sequence[tuple[str, str]] | Literal["auto"], kind: Kind, owner: str):
        auto = isinstance(layers, str) and layers == "auto"
        self.layers = "auto" if auto else [tuple(pair) for pair in _checked_pairs(layers, owner)]
        self.kind = kind
        self.owner = owner

    def find(self, teacher: Linearization, student: Linearization) -> list[tuple[Site, Site]]:
        """The layers in the two networks.

        Raises:
            ValueError: a layer is not found, or does not fit its partner.
        """
        if self.layers == "auto":
            return self._by_size(teacher, student)
        found = []
        for paths in self.layers:
            networks = (("teacher", teacher), ("student", student))
            pair = [self._site(lin, path, role) for (role, lin), path in zip(networks, paths, strict=True)]
            if self.kind != "outputs" and len(pair[0].sizes) != len(pair[1].sizes):
                raise ValueError(
                    f"Invalid value for argument `layers` of {self.owner}. Expected pairs of layers with as many axes "
                    f"of positions. Received: {paths[0]!r} with positions {pair[0].sizes} and {paths[1]!r} with "
                    f"{pair[1].sizes}."
                )
            found.append((pair[0], pair[1]))
        return found

    def _site(self, linearization: Linearization, path: str, role: str) -> Site:
        nodes = linearization.nodes_of(path, "layers", f"paths of layers of the {role}", self.owner)
        if self.kind == "biases":
            biased = [node for node in nodes if not _is_linear(node)]
            if not biased:
                raise ValueError(
                    f"Invalid value for argument `layers` of {self.owner}. Expected layers with a bias or a "
                    f"normalization. Received: {path!r} of the {role}, which has `use_bias=False`; name the "
                    "normalization that follows it."
                )
            nodes = biased
        site = _as_site(path, nodes, linearization)
        if self.kind == "maps" and not site.sizes:
            raise ValueError(
                f"Invalid value for argument `layers` of {self.owner}. Expected layers whose output has positions and "
                f"channels. Received: {path!r} of the {role}, with an output {_shape(nodes[-1])}."
            )
        if self.kind == "biases" and len({_sizes(node, site.channel_axis) for node in nodes}) > 1:
            raise ValueError(
                f"Invalid value for argument `layers` of {self.owner}. Expected layers, or blocks whose layers have "
                f"as many positions. Received: {path!r} of the {role}, with {[_shape(node) for node in nodes]}."
            )
        return site

    def _by_size(self, teacher: Linearization, student: Linearization) -> list[tuple[Site, Site]]:
        """The last layer of each size that both networks have, except single positions. The choice is printed."""
        last: list[dict[tuple[int, ...], Site]] = []
        for linearization in (teacher, student):
            # A later layer of the same size replaces an earlier one.
            last.append({site.sizes: site for site in self._candidates(linearization)})
        pairs = [(site, last[1][sizes]) for sizes, site in last[0].items() if sizes in last[1]]
        if not pairs:
            raise ValueError(
                f'Invalid value for argument `layers` of {self.owner}. Expected pairs of paths, since "auto" found no '
                f"spatial size that both networks have: {sorted(last[0])} of the teacher, {sorted(last[1])} of the "
                'student. Received: "auto"'
            )
        listed = ", ".join(f"{g.path} - {f.path} ({'x'.join(map(str, g.sizes))})" for g, f in pairs)
        print(f"{self.owner} matches (teacher - student): {listed}")
        return pairs

    def _candidates(self, linearization: Linearization) -> Iterator[Site]:
        for node in linearization.nodes:
            if len(node.outputs) == 1 and node.outputs[0].batched:
                site = _as_site(node.name, [node], linearization)
                if max(site.sizes, default=1) > 1 and (self.kind == "maps" or _has_bias(node)):
                    yield site


def _as_site(path: str, nodes: Sequence[Node], linearization: Linearization) -> Site:
    # An activation does not say where its channels are: they are where the last layer that says so has them.
    axis = -1
    for node in linearization.nodes:
        axis = _channel_axis(node) or axis
        if node is nodes[-1]:
            break
    names = tuple(name for node in nodes for name in node.output_names)
    return Site(path, names, axis, _sizes(nodes[-1], axis))


def _sizes(node: Node, channel_axis: int) -> tuple[int, ...]:
    """The shape of a node's output without batch and channels."""
    shape = _shape(node)
    return tuple(size for i, size in enumerate(shape) if i not in (0, channel_axis % len(shape)))


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.outputs[-1].primal.shape)


def _channel_axis(node: Node) -> int | None:
    """The axis of the channels that the layer itself states, or None."""
    if isinstance(node.layer, layers.BatchNormalization):
        return node.layer.axis
    return {"channels_first": 1, "channels_last": -1}.get(getattr(node.layer, "data_format", ""))


def _is_linear(node: Node) -> bool:
    """Whether a node has no intercept, whatever its weights are."""
    return getattr(node.operation, "use_bias", None) is False


def _has_bias(node: Node) -> bool:
    return getattr(node.operation, "bias", None) is not None or isinstance(node.operation, NORMALIZATIONS)


def _checked_pairs(layers: Any, owner: str) -> Any:
    pairs = layers if isinstance(layers, (list, tuple)) else ()
    if not pairs or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(path, str) for path in pair)
        for pair in pairs
    ):
        expected = 'a list of pairs of paths, (teacher_layer, student_layer), or "auto"'
        raise checks.invalid("layers", expected, layers, owner)
    return pairs
