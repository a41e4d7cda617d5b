"""What the kernels need on a card that is not there: registers, spills, load widths."""
