__version__ = "0.1.0"

REPOSITORY = "https://github.com/peft-intrinsic/peft_intrinsic"
"""Where the package is installed from until there is a release: its name on the package index is not ours yet."""


def pip_install(extras: str = "") -> str:
    """The command that installs this package, with `extras` such as `"[codec]"`."""
    return f'pip install -U "peft_intrinsic{extras} @ git+{REPOSITORY}"'
