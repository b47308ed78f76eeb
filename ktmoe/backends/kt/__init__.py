"""kt_kernel's SFT operators: all that knows the kernel and its traps."""
