"""`python -m ktmoe.backends`: one line on which kernel this host can use."""

from ktmoe.backends import kt


if kt.available():
    print(f"kernel variant: {kt.variant()}")
else:
    print(f"no SFT kernel on this host: {kt.variant()}")
