"""Rules: what each operation does to a batch `x`, and what it then does to tangents at that `x`.

`contract` is what a rule returns and what it is told; `families` are the words in which most rules are written;
`registry` knows which operation has which rule. The other modules are the rules of Keras' layers, operations and
activations, one file for each family: importing this package registers them.
"""

from jvpreg.rules import (
    activations,
    attention,
    convolution,
    core,
    loops,
    merging,
    normalization,
    ops,
    pooling,
    preprocessing,
    recurrent,
    regularization,
    reshaping,
    softmax,
)
from jvpreg.rules.contract import Affine, ChannelScale, Context, Declined, Gate, Pushed, Pushforward
from jvpreg.rules.families import each_input, gate, identity, linear, scale
from jvpreg.rules.folding import align, each_probe
from jvpreg.rules.registry import find_rule, register_elementwise, register_rule

__all__ = [
    "Affine",
    "ChannelScale",
    "Context",
    "Declined",
    "Gate",
    "Pushed",
    "Pushforward",
    "activations",
    "align",
    "attention",
    "convolution",
    "core",
    "each_input",
    "each_probe",
    "find_rule",
    "gate",
    "identity",
    "linear",
    "loops",
    "merging",
    "normalization",
    "ops",
    "pooling",
    "preprocessing",
    "recurrent",
    "register_elementwise",
    "register_rule",
    "regularization",
    "reshaping",
    "scale",
    "softmax",
]
