"""Whether Triton can be imported: it has wheels for Linux and Windows only; the rest of the package runs without."""

try:
    import triton  # noqa: F401

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False
