"""The version of the package and where it is installed from."""

__version__ = "0.1.0"

REPOSITORY = "https://github.com/peft-intrinsic/peft_intrinsic"
"""The repository, from which the package is installed until its first release."""


def pip_install(extras: str = "") -> str:
    """The command that installs this package, with `extras` such as `"[codec]"`."""
    return f'pip install -U "peft_intrinsic{extras} @ git+{REPOSITORY}"'
