"""Tasks of other libraries: Brax's bodies and Gymnasium's environments."""
