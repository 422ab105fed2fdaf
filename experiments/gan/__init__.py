"""A GAN on digits, whose critic is trained with a gradient penalty: `python -m experiments gan`."""
