"""The errors that users meet: what they can mend, and a kernel that failed a check."""

from __future__ import annotations


class KTError(ValueError):
    """Something that the user can mend. The message names the argument, what it got, what was expected, the remedy.

    Examples:
        >>> try:
        ...     ktmoe.KTConfig(kt_backend="AMXFB16")
        ... except ktmoe.KTError as error:
        ...     print(error)
        kt_backend: got 'AMXFB16'; expected one of AMXFP8, AMXInt4, AMXBF16, torch, AMXInt8, reference, auto (upper \
or lower case). Did you mean AMXBF16?
    """


class KernelError(RuntimeError):
    """The kernel gave a wrong number or did not survive a check. Nothing that it computed was used.

    Examples:
        >>> config = ktmoe.KTConfig(kt_backend="auto")
        >>> try:
        ...     model = ktmoe.load_model(model_path, config, r=8)
        ... except ktmoe.KernelError:  # the torch backend computes on any CPU
        ...     model = ktmoe.load_model(model_path, ktmoe.KTConfig(kt_backend="torch"), r=8)
    """
