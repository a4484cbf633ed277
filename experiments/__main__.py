"""`python -m experiments NAME [--quick]`: measure one question, draw one figure, say what came out."""

import argparse
import sys

# JAX is imported by the experiment, after diffmbrl has set XLA's flags.
EXPERIMENTS = {
    "verdict": "to plan with a learned model, to differentiate it or to simulate with it: return per real step and second",
    "math_test": "what an open loop, planning anew and a policy are worth where the question is seen only later",
    "conditioning": "how badly conditioned plans and policies are against the horizon, and what whitening does to it",
    "second_order": "when M stays bounded, how much of the planner's step a policy follows, which schedule helps",
    "imitation": "steps in the actions followed by regression of the policy, beside Gauss-Newton on the policy itself",
    "closed_loop": "how far from its start a plan holds, with feedback and planned anew, and how far a trained policy",
    "early_actions": "how much of the gradient comes from which time step",
    "jacobian_products": "whether one step's Jacobian says if gradients explode, or only products do",
    "double_pendulum": "how the variance of pathwise and score-function gradients grows with time in chaos",
    "landscapes": "what the loss and the gradient's variance look like as the unroll grows",
    "metz_spectrum": "what the scale of a first policy does to the Jacobians along its rollout",
    "given_dynamics": "what becomes of gradients and policies when a model's Jacobians are tamed by construction",
    "mixing": "the variance of pathwise, score-function and mixed gradients against the horizon",
    "heaviside": "gradient estimators on a step, hard and soft: bias and variance against closed forms",
    "ball_and_wall": "gradient estimators on a throw over a wall: bias, variance, the mixture, and where ascents end",
    "sinusoid": "the variance of gradient estimators against the frequency of a ripple, against closed forms",
    "bouncing": "the sign of derivatives through a bounce, with three models of the contact and two time steps",
    "pushing": "the variance of gradient estimators against the stiffness of a contact, and the integrator's limit",
    "tennis": "linear policies through contacts that can be missed: bias of pathwise gradients and what it costs",
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
