"""Callbacks that watch the Jacobian of a model while it trains."""

from jvpreg.callbacks.fixed_point import FixedPointMonitor
from jvpreg.callbacks.guard import GuardEvent, JacobianGuard
from jvpreg.callbacks.pictures import JacobianPictures
from jvpreg.callbacks.probe import JacobianProbe
from jvpreg.callbacks.progress import JacobianProgbarLogger
from jvpreg.callbacks.wandb_logger import JacobianWandbLogger

__all__ = [
    "FixedPointMonitor",
    "GuardEvent",
    "JacobianGuard",
    "JacobianPictures",
    "JacobianProbe",
    "JacobianProgbarLogger",
    "JacobianWandbLogger",
]
