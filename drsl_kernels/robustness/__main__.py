"""`python -m drsl_kernels.robustness`, the same as the command `drsl`."""

from .cli import main

if __name__ == "__main__":
    main()
