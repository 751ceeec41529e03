"""What the subcommands of `peft-intrinsic` do: a function for each, with the parsed options as its argument."""
