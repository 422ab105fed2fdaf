"""Attention. The layers are opened up into their projections and this operation between them."""

import math

import keras
import numpy as np
from keras import ops

from jvpreg.common.eager import shape_of
from jvpreg.common.keras_private import nn
from jvpreg.rules.contract import Declined, Pushforward
from jvpreg.rules.examples import besides
from jvpreg.rules.registry import register_rule


def _scale(given, size: int):
    """The factor of logits, by default `1 / √size`. TensorFlow rounds it to float32, whatever their dtype."""
    if keras.backend.backend() != "tensorflow":
        return 1 / math.sqrt(size) if given is None else given
    if given is None:
        return float(np.float32(1) / np.sqrt(np.float32(size)))
    return float(np.float32(given)) if type(given) is float else given


def _is_rounded(query) -> bool:
    """Whether Keras computes in float32 what it is given in float64: on JAX the softmax, on Torch all of it."""
    dtype = keras.backend.standardize_dtype(query.dtype)
    return dtype == "float64" and (keras.backend.backend() == "jax" or keras.backend.result_type(dtype, dtype) != dtype)


def _mask(operation, mask, shape: tuple, heads: int, groups: int):
    """Which logits count, to be broadcast to their shape `(B, M, G, T, S)`; None if all do."""
    if operation.is_causal:
        rows, columns = shape[-2:]
        kept = ops.arange(rows)[:, None] >= ops.arange(columns)
        mask = kept if mask is None else ops.logical_and(kept, mask)
    if mask is None:
        return None
    mask = ops.cast(mask, "bool")
    return mask if len(mask.shape) != 4 else _by_heads(mask, heads, groups)


def _by_heads(of_logits, heads: int, groups: int):
    """`(…, N, T, S)` or `(…, 1, T, S)` with the heads N as the logits have them, on the axes (M, G)."""
    if of_logits.shape[-3] == 1:
        return ops.expand_dims(of_logits, -3)
    shape = shape_of(of_logits)
    return ops.reshape(of_logits, (*shape[:-3], heads, groups, *shape[-2:]))


@register_rule(nn.DotProductAttention)
def dot_product_attention(operation, query, key, value, context, bias=None, mask=None, scale=None):
    """`softmax(scale · q kᵀ) v`, with frozen probabilities: queries (B, T, N, H), keys and values (B, S, M, H)."""
    if operation.attn_logits_soft_cap is not None:
        raise Declined("a soft cap of the logits")
    if bias is not None and len(bias.shape) != 4:
        raise Declined("a bias without axes for examples and heads")
    own, groups = {"bias": bias, "mask": mask, "scale": scale}, query.shape[2] // key.shape[2]
    scale = _scale(scale, query.shape[-1])

    # Index legend: b batch, t and s positions of queries and of keys, m heads of keys, g queries' heads for each, h
    # channels; p probes.
    def grouped(heads):
        shape = ops.shape(heads)
        return ops.reshape(heads, (*shape[:-2], key.shape[2], groups, shape[-1]))

    logits = scale * ops.einsum("btmgh,bsmh->bmgts", grouped(query), key)
    if bias is not None:
        logits = logits + _by_heads(bias, key.shape[2], groups)
    given = mask is not None
    mask = _mask(operation, mask, shape_of(logits), key.shape[2], groups)
    if mask is not None:
        logits = ops.where(mask, logits, -1e30 if keras.backend.standardize_dtype(logits.dtype) != "float16" else -6e4)
    probabilities = ops.softmax(logits)

    def merged(heads):
        shape = ops.shape(heads)
        return ops.reshape(heads, (*shape[:-3], query.shape[2], shape[-1]))

    y = merged(ops.einsum("bmgts,bsmh->btmgh", probabilities, value))
    residuals = [query, key, value, probabilities, y]
    if given:
        # If a whole row is masked, its probabilities are equal and constant.
        residuals.append(ops.where(mask, probabilities, 0))

    def push(query_tangent, key_tangent, value_tangent, *others):
        # A bias or a mask is an input too: its tangent comes before the residuals, and is None if it is a mask's.
        bias_tangent = others[0] if bias is not None else None
        query, key, value, probabilities, y, *_ = others[-len(residuals) :]
        moving = others[-1] if given else probabilities
        images, moved = [], []
        if query_tangent is not None:
            moved.append(ops.einsum("pbtmgh,bsmh->pbmgts", grouped(query_tangent), key[0]))
        if key_tangent is not None:
            moved.append(ops.einsum("btmgh,pbsmh->pbmgts", grouped(query[0]), key_tangent))
        moved = [scale * sum(moved[1:], moved[0])] if moved else []
        if bias_tangent is not None:
            moved.append(_by_heads(bias_tangent, key.shape[-2], groups))
        if moved:
            weighted = moving * sum(moved[1:], moved[0])
            # A column of ones beside the values: the same product then gives the sums of the weights too.
            ones = ops.ones_like(value[0, ..., :1])
            summed = ops.einsum("pbmgts,bsmh->pbtmgh", weighted, ops.concatenate([value[0], ones], axis=-1))
            images.append(summed[..., :-1] - summed[..., -1:] * grouped(y))
        if value_tangent is not None:
            images.append(ops.einsum("bmgts,pbsmh->pbtmgh", ops.squeeze(probabilities, 0), value_tangent))
        return merged(sum(images[1:], images[0]))

    # The slopes are those of the exact probabilities all the same.
    returned = operation.call(query, key, value, **own) if _is_rounded(query) else y
    return returned, Pushforward(push, *residuals, takes_none=True, examples=besides([1, 2, 3], 4))
