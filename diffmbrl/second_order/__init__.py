"""Linear algebra along a trajectory: linearisation, Riccati sweeps, curvature products, Krylov spaces."""
