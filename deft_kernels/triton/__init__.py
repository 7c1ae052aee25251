"""The Triton kernels, one file per operation, and their launch configurations, one JSON file per device.

Imported by `deft_kernels.ops` when a kernel is first asked for; `deft_kernels.backends()` tells which serves what.
"""
