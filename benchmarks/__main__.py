"""`python -m benchmarks NAME [--quick]`: run one benchmark, or list them."""

import argparse
import importlib
import sys

# JAX is imported by the benchmark, after diffmbrl has set XLA's flags.
BENCHMARKS = {
    "primitives": "rollout, gradient, linearisation, Riccati, products and updates, as multiples of the rollout",
    "planners": "iLQR and DDP against Crocoddyl, CasADi and diffilqrax to 0.1% of the optimum, and from many starts",
    "rematerialisation": "gradient memory and time against the segments of the scan that are recomputed",
    "first_vs_second": "every optimiser on every task at four horizons, with the same continuation",
    "robust": "explored-newton on every task, twenty seeds, nothing tuned, beside krylov-newton, L-BFGS and Adam",
    "wide": "wall-clock to L-BFGS's final cost at 1024 starts, on the device at hand",
    "scipy_lbfgs": "L-BFGS of scipy around one compiled gradient against optax's, compiled whole",
    "mpc": "step times of receding-horizon control with iLQR, and its return beside the open-loop plan's",
    "squash": "Gauss-Newton with action limits squashed in the policy, in the plant, and there with a cost on the logit",
    "preconditioning": "Gauss-Newton's Krylov space in the metric of diagonal and block approximations",
    "cem": "one action of CEM on an ensemble, beside its matrix products, mbrl-lib and planners that take gradients",
    "sac": "a SAC update beside its matrix products alone and Brax's",
    "mbpo": "MBPO on the balancing cart-pole and the inverted pendulum: real steps and CPU seconds to the best return",
    "fit": "training an ensemble and rolling it out, beside the matrix products alone and mbrl-lib",
    "mbrl": "real steps and CPU seconds of MPC through learned ensembles on the cart-poles of mbrl-lib and PETS",
    "riccati": "the LQR sweep by scan and in parallel over time; implicit gradients of a plan as shares of its solve",
    "estimators": "each estimator's gradient as a multiple of its own forward and backward passes",
    "brax": "steps and gradients of Brax environments: compile and run times, and how far gradients are right",
    "brax_peers": "Brax reacher and inverted pendulum by MPC, by windows with a critic and by Brax's own APG, PPO and SAC",
    "brax_runners": "Brax hopper and ant by windows with a critic, for a GPU",
    "health": "CPU seconds of a whole diagnosis, compilation cache empty and warm",
    "safe_horizon": "the steps up to which a float32 gradient is right, for the table of tasks",
}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=sorted(BENCHMARKS), help="; ".join(f"{k}: {v}" for k, v in BENCHMARKS.items()))
    parser.add_argument("--quick", action="store_true", help="the same shape with less of everything")
    arguments = parser.parse_args()
    importlib.import_module(f"benchmarks.{arguments.name}").run(quick=arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
