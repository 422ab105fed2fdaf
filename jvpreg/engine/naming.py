"""What nodes are called: by the paths of layers, and by attributes where a user named them."""

from dataclasses import dataclass
from typing import Any

import keras

from jvpreg.engine.paths import is_within, join, walk
from jvpreg.rules.registry import find_rule


@dataclass(frozen=True)
class Scope:
    """The operation that runs, as a place for the names of what runs in it.

    Attributes:
        name: as the nodes in it have it: `encoder:1` at the second use.
        path: as `layer_paths` has it: `encoder`.
    """

    name: str = ""
    path: str = ""


OUTSIDE = Scope()
"""The scope of the model itself."""


class Names:
    """The names of everything that runs in a model.

    Args:
        root: the model that runs, whose name is part of no path.
    """

    def __init__(self, root: Any = None):
        self.root = root
        self._uses: dict[str, int] = {}
        # The paths of layers by their `id`, and how attributes reach those that have a name of the user's.
        self._names: dict[int, str] = {}
        self._attributes: dict[str, str] = {}
        self._walked: set[int] = set()

    def scope(self, operation, scope: Scope, kind: str | None) -> Scope:
        """What an operation is called that runs in a scope."""
        path = self._names.get(id(operation))
        if path is None:
            own = kind or (getattr(operation, "name", None) or operation.__name__)
            path = join(scope.path, "/", own)
            if isinstance(operation, keras.Layer):
                self._names[id(operation)] = path
        # If a layer runs a second time, so do the layers in it. A shared layer belongs to the place where it was found.
        within = bool(scope.path) and is_within(path, scope.path)
        return Scope(scope.name + path[len(scope.path) :] if within else path, path)

    def within(self, layer, name: str) -> Scope:
        """The scope of a layer that is opened up. The layers in it get their names once."""
        scope = OUTSIDE if layer is self.root else Scope(name, self._names.get(id(layer), name))
        if isinstance(layer, keras.Layer) and id(layer) not in self._walked:
            for known, attributes, inner in walk(layer, scope.path, self.by_attributes(scope.path)):
                if find_rule(inner) is None:
                    self._walked.add(id(inner))
                if self._names.setdefault(id(inner), known) == known != attributes:
                    self._attributes[known] = attributes
        return scope

    def by_attributes(self, name: str) -> str:
        """A name with attributes in place of the names that the user gave to layers."""
        named = [known for known in self._attributes if name.startswith(known) and name[len(known) :][:1] in "./:"]
        longest = max(named, key=len, default="")
        return self._attributes.get(longest, "") + name[len(longest) :]

    def unique(self, name: str) -> str:
        """The name, with the number of its use from the second use on: `name:1`."""
        uses = self._uses.get(name, 0)
        self._uses[name] = uses + 1
        return f"{name}:{uses}" if uses else name
