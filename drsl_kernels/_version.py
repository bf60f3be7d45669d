"""The version of the package: `pyproject.toml` and `drsl_kernels.__version__` both read it here."""

__version__ = "0.1.0"
