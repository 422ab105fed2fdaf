"""`JacobianModel`: training with penalties on the Jacobian, through plain `compile` and `fit`."""
