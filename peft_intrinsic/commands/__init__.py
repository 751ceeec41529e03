"""What the commands of `peft-intrinsic` do."""
