"""`python -m experiments NAME [--quick]`: measure one question, draw one figure, say what came out."""

import argparse
import sys

# JAX is imported by the experiment, after diffmbrl has set XLA's flags.
EXPERIMENTS = {
    "conditioning": "how badly conditioned plans and policies are against the horizon, and what whitening does to it",
    "second_order": "when M stays bounded, how much of the planner's step a policy follows, which schedule helps",
    "imitation": "steps in the actions followed by regression of the policy, beside Gauss-Newton on the policy itself",
    "closed_loop": "how far from its start a plan holds, with feedback and planned anew, and how far a trained policy",
    "truncation": "what Adam reaches when the gradient is stopped every t steps, clipped and not",
    "short_horizon": "what windows with a critic learn beside the full unroll, how smooth they are, how long they should be",
    "first_vs_second": "every method of the table at its best learning rate, against iterations, work and time",
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        epilog="; ".join(f"{name}: {question}" for name, question in EXPERIMENTS.items()),
    )
    parser.add_argument("name", choices=sorted(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="the same shape with less of everything")
    parser.add_argument(
        "--redraw", action="store_true", help="the figure and the sentence again, from the saved numbers"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what an earlier run has left")
    arguments = parser.parse_args(argv)
    from experiments.record import redraw, run

    try:
        if arguments.redraw:
            path = redraw(arguments.name, quick=arguments.quick)
        else:
            path = run(arguments.name, quick=arguments.quick, fresh=arguments.fresh)
    except FileNotFoundError as error:
        print(f"python -m experiments: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
