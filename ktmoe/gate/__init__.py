"""The two checks that stand before the kernel."""
