"""`python -m peft_intrinsic`: the command `peft-intrinsic`."""

from peft_intrinsic_cli import main

if __name__ == "__main__":
    main()
