"""States as shapes, and shapes as animations: HTML and GIF."""
