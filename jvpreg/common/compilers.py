"""What is known of the compiler of the function that is being traced."""

import keras


def traced_by_tensorflow() -> bool:
    """Whether TensorFlow is tracing a graph, and not yet for XLA.

    Another function, which XLA compiles, may call this one later: TensorFlow does not trace it again for that.
    """
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly() and not traced_for_xla()


def traced_for_xla() -> bool:
    """Whether TensorFlow is tracing a graph for XLA to compile: a `tf.function(jit_compile=True)`, or one within it."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    # TensorFlow has no public way to ask, and asks itself in this way.
    from tensorflow.python.ops import control_flow_util

    return not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
