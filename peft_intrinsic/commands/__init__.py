"""What the subcommands of `peft-intrinsic` do: a function for each, with the parsed options as its argument.

Invalid input raises `ValueError`, of which the command prints the message.
"""
