"""Tasks made from tasks: delayed, noisy, squashed, with a soft margin."""
