"""`python -m ktmoe.backends`: one line on which kernel this host can use."""

from ktmoe.backends.kt import kernel


if kernel.available():
    print(f"kernel variant: {kernel.variant()}")
else:
    print(f"no SFT kernel on this host: {kernel.variant()}")
